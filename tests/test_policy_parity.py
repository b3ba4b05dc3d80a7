"""Real verl steps: the policy that samples is the policy that is trained, weight sync after weight sync."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from models import sharp_model
from parallel_r1.report.plots import load_training_metrics
from parallel_r1.structure import REGIONS, annotate
from parallel_r1.supervise import run_stage
from parallel_r1.tags import tag_ids

BOUND = 1e-4  # nats, float32
STEPS = 4
# The model is random and never right, so advantages are zero; decay moves its weights instead, 10% a step.
MOVING = [f"actor_rollout_ref.actor.optim.{name}" for name in ("lr=1e-2", "lr_warmup_steps=0", "weight_decay=10")]


def train(folder: Path, model: Path, problems: Path, *overrides: str) -> Path:
    """Four steps of RL with three paths a block; returns the metrics file. Rollouts are in ``folder/rollouts``."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    command = [sys.executable, "-m", "parallel_r1.training.rl", "quickstart_rl"]
    command += [f"data.train_files={problems}", f"data.val_files={problems}", "data.train_batch_size=4"]
    command += ["data.max_prompt_length=128", "data.max_response_length=192"]
    command += [f"{rollout}.max_model_len=320", f"{rollout}.max_num_seqs=256"]
    command += [f"actor_rollout_ref.model.path={model}", f"{actor}.ppo_mini_batch_size=4"]
    command += [f"{actor}.ppo_micro_batch_size_per_gpu=8", f"{rollout}.log_prob_micro_batch_size_per_gpu=16"]
    command += [f"trainer.default_local_dir={folder / 'rl'}", "trainer.save_freq=-1"]
    command += [f"trainer.total_training_steps={STEPS}", f"trainer.rollout_data_dir={folder / 'rollouts'}"]
    command += ["parallel_r1.rollout.num_paths=3", "parallel_r1.rollout.max_path_tokens=12", *MOVING, *overrides]
    metrics = folder / "rl.jsonl"
    environment = {"VERL_FILE_LOGGER_PATH": str(metrics)}
    run_stage("parity", command, log=folder / "rl.log", env=environment, deadline=400, stall=200)
    return metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharp_model(tmp_path_factory.mktemp("loud") / "model", loud=1.6)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_exact_mode_samples_from_the_policy_that_is_trained(tmp_path: Path, model: Path, arithmetic: Path) -> None:
    metrics = load_training_metrics(
        [train(tmp_path, model, arithmetic / "train.parquet", "parallel_r1.rollout.num_paths=[3,4]")]
    )
    for region in REGIONS:
        steps, worst = metrics.series(f"mismatch/{region}_max")
        assert list(steps) == list(range(1, STEPS + 1)), region  # a sync before the first step and after every step
        assert np.max(worst) < BOUND, (region, worst)
    assert np.max(metrics.series("mismatch/over_bound")[1]) == 0

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    blocks, responses = [], set()
    for path in sorted((tmp_path / "rollouts").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            output = json.loads(line)["output"]
            responses.add(output)
            found = annotate(tokenizer.encode(output, add_special_tokens=False), tag_ids(tokenizer)).blocks
            blocks.append([len(block.paths) for block in found])
    assert sum(len(found) >= 2 for found in blocks) >= 10, "too few responses with two blocks to tell"
    assert {count for found in blocks for count in found} >= {3, 4}
    assert len(responses) > len(blocks) / 2


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_paper_mode_is_another_policy_and_says_so(tmp_path: Path, model: Path, arithmetic: Path) -> None:
    metrics = load_training_metrics(
        [train(tmp_path, model, arithmetic / "train.parquet", "parallel_r1.fidelity=paper", "data.seed=2")]
    )
    for region in ("summary", "after"):
        assert np.min(metrics.series(f"mismatch/{region}_max")[1]) > 1000 * BOUND, region
    # a path differs only after an earlier block, and not every step has a second one
    assert np.max(metrics.series("mismatch/path_max")[1]) > 1000 * BOUND
    # what both sides see alike stays exact: the difference is the mask, not the arithmetic
    assert np.max(metrics.series("mismatch/trunk_max")[1]) < BOUND
    assert np.min(metrics.series("mismatch/over_bound")[1]) == 1
    log = (tmp_path / "rl.log").read_text(errors="replace")
    assert "the sampled policy is not the trained one" in log
    assert os.path.getsize(tmp_path / "rollouts" / "1.jsonl") > 0

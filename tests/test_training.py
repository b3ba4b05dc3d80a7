"""Configurations compose and refuse nonsense; step metrics; the CPU engine's log-probabilities."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from parallel_r1.config import ParallelConfig
from parallel_r1.tags import TagIds
from parallel_r1.training.compose import CONFIGS, ConfigError, compose
from parallel_r1.training.metrics import mismatch_metrics, rollout_metrics

TAGS = TagIds(1000, 1001, 1002, 1003, 1004, 1005)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "agent_loops"))
def test_every_configuration_composes(name: str) -> None:
    config = compose(name)
    assert config.trainer.project_name == "parallel-r1"
    if "parallel_r1" in config:
        ParallelConfig.from_mapping(config.parallel_r1)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("quickstart_rl", "foo=1", "foo"),
        ("quickstart_rl", "+parallel_r1.reward.windw=3", "unknown key parallel_r1.reward.windw"),
        ("quickstart_rl", "parallel_r1.reward.window=-1", "window is -1"),
        ("quickstart_rl", "not an override", "not an override"),
        ("nothing", "", "no configuration 'nothing'"),
        ("quickstart_rl", "actor_rollout_ref.rollout.temperature=0.7", "processed_logprobs"),
        ("quickstart_rl", "actor_rollout_ref.rollout.full_determinism=true", "full_determinism"),
    ],
)
def test_configuration_errors_are_one_line(name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(name, [override] if override else [])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_command_line_error_has_no_traceback() -> None:
    command = [sys.executable, "-m", "parallel_r1.training.rl", "quickstart_rl", "foo=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "foo" in done.stderr


@pytest.mark.parametrize(("module", "key"), [("rl", "actor_rollout_ref.model.path"), ("sft", "model.path")])
def test_a_missing_model_path_is_one_line(module: str, key: str) -> None:
    command = [sys.executable, "-m", f"parallel_r1.training.{module}", f"quickstart_{module}", f"{key}=/no/such/model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert key in done.stderr and "/no/such/model" in done.stderr


def test_importing_the_package_pulls_in_neither_torch_nor_vllm() -> None:
    program = (
        "import sys, parallel_r1, parallel_r1.structure, parallel_r1.rollout.fork_join, parallel_r1.rewards.reward;"
    )
    program += "print({'torch', 'vllm', 'verl', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_mismatch_is_split_by_what_both_sides_saw() -> None:
    po, pc, p, ep, s, es = TAGS
    ids = np.array([po, p, 1, ep, p, 2, ep, pc, s, 3, es, 4])
    mask = np.array([1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1])
    engine, trainer = np.zeros(12), np.zeros(12)
    engine[4] = 99.0  # inserted: never counted
    engine[5] = 0.5  # second path: another context
    engine[9] = -0.25  # summary: the same context
    found = mismatch_metrics([(ids, mask, engine, trainer)], TAGS)
    assert found["mismatch/other_context_max"] == 0.5 and found["mismatch/other_context_mean"] == 0.25
    assert found["mismatch/same_context_max"] == 0.25 and found["mismatch/same_context_mean"] == 0.25 / 6
    assert mismatch_metrics([], TAGS) == {}


def test_rollout_metrics_are_counted_by_hand() -> None:
    base = {"valid": 1.0, "violations": [], "truncated": 0.0, "forced_closers": 0.0}
    infos = [
        base
        | {"acc": 1.0, "has_block": 1.0, "grade": "ok", "position": 0.2, "tokens": 10, "critical_tokens": 6}
        | {"paths_per_block": [2, 3]},
        base
        | {"acc": 0.0, "has_block": 0.0, "grade": "wrong", "position": None, "tokens": 10, "critical_tokens": 10}
        | {"paths_per_block": [], "valid": 0.0, "violations": ["unclosed <Path> at character 3"], "truncated": 1.0},
    ]
    found = rollout_metrics(infos, [1.2, -1.0])
    assert found["reward/score"] == pytest.approx(0.1) and found["reward/accuracy"] == 0.5
    assert found["parallel/ratio"] == 0.5 and found["parallel/position"] == 0.2
    assert found["parallel/paths_per_block"] == 2.5 and found["parallel/critical_share"] == 0.8
    assert found["grade/ok"] == found["grade/wrong"] == 0.5 and found["violation/unclosed <Path>"] == 0.5
    assert found["rollout/truncated_ratio"] == 0.5 and found["parallel/valid_ratio"] == 0.5


def test_engine_log_probs_equal_a_plain_forward() -> None:
    """The vectorised log-probabilities against log_softmax, row by row, with temperatures and a gradient."""
    from types import SimpleNamespace

    from verl.utils import tensordict_utils as tu

    from parallel_r1.engine.fsdp import CPUFSDPEngineWithLMHead

    torch.manual_seed(0)
    lengths, vocabulary = [5, 3], 11
    ids = [torch.randint(0, vocabulary, (n,)) for n in lengths]
    logits = torch.randn(2, max(lengths), vocabulary, requires_grad=True)
    temperature = torch.tensor([1.0, 0.7])
    batch = tu.get_tensordict(
        {"input_ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged)},
        {"use_remove_padding": False, "calculate_entropy": True},
    )
    labels = torch.cat(ids).roll(-1)
    engine = object.__new__(CPUFSDPEngineWithLMHead)
    found = engine.prepare_model_outputs(
        SimpleNamespace(logits=logits), {"temperature": temperature, "input_ids_rmpad_rolled": labels}, batch, None
    )
    start = 0
    for row, n in enumerate(lengths):
        expected = (logits[row, :n] / temperature[row]).log_softmax(-1)
        got = found["log_probs"].unbind()[row]
        assert torch.allclose(got, expected.gather(-1, labels[start : start + n, None])[:, 0], atol=1e-6)
        assert torch.allclose(found["entropy"].unbind()[row], -(expected.exp() * expected).sum(-1), atol=1e-5)
        start += n
    found["log_probs"].values().sum().backward()
    assert logits.grad[1, lengths[1] :].abs().sum() == 0 and logits.grad[0].abs().sum() > 0  # padding gets no gradient

"""The quickstart: its errors, and one smoke run of the whole chain that is interrupted, killed and resumed."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from conftest import ROOT
from parallel_r1.leftovers import StageError
from parallel_r1.report.plots import load_training_metrics
from parallel_r1.supervise import run_stage

COMMAND = [sys.executable, "-m", "parallel_r1.quickstart"]
BOUND = 1e-4  # nats; float32 rounding gives 1e-6 on this model, a stale engine far more
SEED = 5
# The smoke model is never right, so all advantages are zero; decay moves its weights instead, 10% a step, or a weight
# sync would have nothing to bring.
MOVING = [f"actor_rollout_ref.actor.optim.{name}" for name in ("lr=1e-2", "lr_warmup_steps=0", "weight_decay=10")]


def quickstart(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    assert done.returncode != 0 and len(lines) == 1, done.stderr
    return lines[0]


# ---- bad input: one clear line, nothing destroyed


def test_unknown_key_is_refused_before_anything_starts(tmp_path: Path) -> None:
    error = one_line_error(quickstart("--out", tmp_path / "run", "parallel_r1.reward.swich_step=3"))
    assert "swich_step" in error and not (tmp_path / "run").exists()


def test_run_folder_of_another_configuration(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    before = json.dumps({"settings": {"seed": 1}, "overrides": []})
    (out / "run.json").write_text(before)
    error = one_line_error(quickstart("--out", out, "--seed", 2))
    assert "another configuration" in error and "seed" in error and "--fresh" in error and "--out" in error
    assert (out / "run.json").read_text() == before


@pytest.mark.parametrize("options", [(), ("--fresh",)])
def test_folder_with_something_else_in_it(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    error = one_line_error(quickstart("--out", tmp_path, *options))
    assert str(tmp_path) in error
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in one_line_error(quickstart("--out", tmp_path / "file" / "run"))


def test_two_at_once(tmp_path: Path) -> None:
    from parallel_r1.run_lock import RunLock

    out = tmp_path / "run"
    out.mkdir()
    with RunLock(out):
        error = one_line_error(quickstart("--out", out))
    assert str(os.getpid()) in error and sorted(p.name for p in out.iterdir()) == [".lock"]


def test_missing_model_path(tmp_path: Path, arithmetic: Path) -> None:
    command = [sys.executable, "-m", "parallel_r1.evaluation.generate", "quickstart_rl", "--out", str(tmp_path / "s")]
    command += ["--model", str(tmp_path / "nowhere"), "--problems", str(arithmetic / "heldout.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "no model at" in one_line_error(done)


def test_real_verl_is_imported_from_the_repository_root() -> None:
    assert not (ROOT / "verl" / "__init__.py").exists()
    program = "import verl; print(verl.__file__, verl.__version__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "site-packages" in done.stdout and done.stdout.split()[-1] == "0.9.1", done.stderr


# ---- the chain


class Run:
    """A quickstart in the background."""

    def __init__(self, out: Path, *options: str):
        self.out = out
        command = [*COMMAND, "--smoke", "--seed", str(SEED), "--out", str(out), *options, *MOVING]
        self.log = (out.parent / f"{out.name}.out").open("a+")
        # a shell starts background jobs with Ctrl-C ignored, and the tests may run in one
        unignore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, preexec_fn=unignore)
        self.tree: dict[int, psutil.Process] = {}

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        """Watch the process tree until ``condition`` holds."""
        until = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < until, f"not within {seconds} s: {self.output()}"
            self._look()
            time.sleep(0.2)
        self._look()

    def finish(self, seconds: float) -> int:
        until = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < until, f"still running after {seconds} s: {self.output()}"
            self._look()
            time.sleep(0.5)
        return self.process.returncode

    def _look(self) -> None:
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.tree.setdefault(child.pid, child)
        except psutil.NoSuchProcess:
            pass

    def survivors(self) -> list[psutil.Process]:
        return [p for p in self.tree.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def output(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()

    def rl_checkpoint(self) -> int:
        path = self.out / "rl" / "latest_checkpointed_iteration.txt"
        return int(path.read_text() or 0) if path.is_file() else 0


def segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A finished smoke run: Ctrl-C while RL starts, SIGKILL after the RL checkpoint of step 2, then to the end."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    before = segments()

    first = Run(out)
    first.wait_for(lambda: "ray" in _log(out, "rl"), 300)
    time.sleep(5)
    first.process.send_signal(signal.SIGINT)
    assert first.finish(60) != 0 and "run it again to continue" in first.output()
    assert first.survivors() == [] and segments() - before == set()

    second = Run(out)
    second.wait_for(lambda: second.rl_checkpoint() == 2, 400)
    second.process.kill()
    second.process.wait()
    shutil.copytree(out, out.parent / "killed")

    third = Run(out)
    assert third.finish(600) == 0, third.output()
    assert [p for run in (second, third) for p in run.survivors()] == []
    assert segments() - before == set()
    yield third


def _log(out: Path, stage: str) -> str:
    path = out / "logs" / f"{stage}.log"
    return path.read_text(errors="replace") if path.is_file() else ""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_report_is_complete(smoke: Run) -> None:
    report = json.loads((smoke.out / "report.json").read_text())
    for name in ("sft", "rl"):
        accuracy = report[name]["accuracy"]
        assert accuracy["n"] == 32 and 0 <= accuracy["low"] <= accuracy["mean"] <= accuracy["high"] <= 1
        assert 0 <= report[name]["valid_ratio"] <= 1 and 0 <= report[name]["parallel_ratio"] <= 1
    assert set(report["seconds"]) == {"data", "model", "sft", "rl", "evaluate_sft", "evaluate_rl"}
    assert report["training"]["switch_step"] == 3 and report["run"]["versions"]["verl"] == "0.9.1"
    markdown = (smoke.out / "report.md").read_text()
    assert (
        "## Sampled rollouts" in markdown and markdown.count("```text") >= 2
    )  # so short a run may have no correct one
    for name in ("reward", "accuracy", "parallel_ratio", "position"):
        assert any(name in path.name for path in (smoke.out / "plots").glob("*.png")), name
    output = smoke.output()
    assert "already done" in output and "[7/7] report" in output
    assert "vllm" not in output.lower().replace("vllm-", "") or "Traceback" not in output  # noise stays in the logs


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_resume_continues_steps_schedule_and_data_order(smoke: Run) -> None:
    from torch import Generator
    from torchdata.stateful_dataloader.sampler import RandomSampler

    files = sorted((smoke.out / "metrics").glob("rl-*.jsonl"))
    steps = [[json.loads(line)["step"] for line in file.read_text().splitlines()] for file in files]
    assert [s for s in steps if s][-1] == [3, 4]  # the last start went on after the checkpoint
    metrics = load_training_metrics(files)
    at, phases = metrics.series("reward/phase")
    assert list(at) == [1, 2, 3, 4] and list(phases) == [0, 0, 2, 2]

    train = pd.read_parquet(smoke.out / "data" / "train.parquet")
    order = list(RandomSampler(range(len(train)), generator=Generator().manual_seed(SEED)))
    for step in range(1, 5):
        rows = [json.loads(line) for line in (smoke.out / "rollouts" / f"{step}.jsonl").read_text().splitlines()]
        asked = {row["input"].split("Calculate ")[1].split(".")[0] for row in rows}
        wanted = order[4 * (step - 1) : 4 * step]
        assert asked == {train["prompt"][i][0]["content"].split("Calculate ")[1].rstrip(".") for i in wanted}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_engine_and_trainer_agree_after_weight_syncs(smoke: Run) -> None:
    # tests/test_policy_parity.py does the same with a model that reacts to the mask, and has the control
    metrics = load_training_metrics(sorted((smoke.out / "metrics").glob("rl-*.jsonl")))
    steps, worst = metrics.series("mismatch/all_max")
    assert list(steps) == [1, 2, 3, 4]  # step 2 has seen two syncs, step 4 three: at start and after every step
    assert np.max(worst) < BOUND, worst
    assert list(metrics.series("mismatch/path_max")[0]) == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_paths_of_a_block_overlap_in_time_and_land_in_order(smoke: Run) -> None:
    samples = [json.loads(line) for name in ("sft", "rl") for line in (smoke.out / f"{name}_samples.jsonl").open()]
    blocks = 0
    for sample in samples:
        spans = {tuple(request["segment"]): (request["start"], request["end"]) for request in sample["requests"]}
        for kind, block, _ in list(spans):
            if kind != "summary":
                continue
            blocks += 1
            paths = [spans["path", block, k] for k in range(2)]
            assert max(start for start, _ in paths) < min(
                end for _, end in paths
            )  # all paths were in the engine at once
            assert spans["trunk", block, 0][1] <= min(start for start, _ in paths)
            assert max(end for _, end in paths) <= spans["summary", block, 0][0]
    assert blocks >= 3, "too few blocks to tell"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_seen_variant_trains_and_its_checkpoint_says_so(smoke: Run, tmp_path: Path) -> None:
    data = smoke.out / "data"
    command = [sys.executable, "-m", "parallel_r1.training.sft", "quickstart_sft", "parallel_r1.variant=seen"]
    command += [f"data.train_files={data / 'cold_start.parquet'}", f"model.path={smoke.out / 'model'}"]
    command += [f"trainer.default_local_dir={tmp_path / 'sft'}", "trainer.total_training_steps=2"]
    metrics = tmp_path / "sft.jsonl"
    environment = {"VERL_FILE_LOGGER_PATH": str(metrics)}
    run_stage("seen", command, log=tmp_path / "sft.log", env=environment, deadline=200, stall=100)
    losses = [json.loads(line)["data"]["train/loss"] for line in metrics.read_text().splitlines()]
    assert len(losses) == 2 and np.isfinite(losses).all()
    seen, unseen = (
        tmp_path / "sft" / "global_step_2" / "huggingface",
        smoke.out / "sft" / "global_step_4" / "huggingface",
    )
    for checkpoint, kind in ((seen, "causal"), (unseen, "turns")):
        config = json.loads((checkpoint / "config.json").read_text())
        assert config["parallel_r1_structure"] == kind and "attn_implementation" not in config
    # answered with the structured engine it would be another policy
    command = [sys.executable, "-m", "parallel_r1.evaluation.generate", "quickstart_rl", "--model", str(seen)]
    command += ["--problems", str(data / "heldout.parquet"), "--out", str(tmp_path / "samples.jsonl"), "--limit", "4"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "was trained with parallel_r1_structure=causal" in one_line_error(refused)
    subprocess.run([*command, "parallel_r1.variant=seen"], check=True, capture_output=True, timeout=150)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_broken_weight_sync_is_caught(smoke: Run, tmp_path: Path) -> None:
    metrics = tmp_path / "rl.jsonl"
    command = [sys.executable, "-m", "parallel_r1.training.rl", "quickstart_rl"]
    command += [f"data.{name}_files={smoke.out / 'data' / 'train.parquet'}" for name in ("train", "val")]
    command += [f"actor_rollout_ref.model.path={smoke.out / 'sft' / 'global_step_4' / 'huggingface'}"]
    command += [
        f"trainer.default_local_dir={tmp_path / 'rl'}",
        "trainer.save_freq=-1",
        "trainer.total_training_steps=3",
    ]
    command += ["data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4"]
    command += ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32"]
    command += ["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32"]
    command += MOVING
    command += ["actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=broken_sync.NoReload"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "VERL_FILE_LOGGER_PATH": str(metrics)}
    run_stage("broken sync", command, log=tmp_path / "rl.log", env=environment, deadline=400, stall=200)
    worst = load_training_metrics([metrics]).series("mismatch/all_max")[1]
    assert worst[0] < BOUND  # the engine loaded the same checkpoint
    assert np.min(worst[1:]) > 100 * BOUND  # and never got another one


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dead_engine_ends_the_run_with_a_clear_error(smoke: Run) -> None:
    before = segments()
    run = Run(smoke.out.parent / "killed", "--stall", "60")  # the folder as it was when the second run was killed

    def engines() -> list[psutil.Process]:
        return [p for p in run.tree.values() if p.is_running() and "EngineCore" in " ".join(p.cmdline())]

    run.wait_for(lambda: bool(engines()) and _log(run.out, "rl").count("all initialize finished") >= 2, 300)
    engines()[0].kill()
    assert run.finish(200) != 0
    message = run.output()
    assert "rl" in message and "logs/rl.log" in message
    assert run.survivors() == [] and segments() - before == set()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_stage_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no progress"):
        run_stage(
            "hang", [sys.executable, "-c", "import time; time.sleep(99)"], log=tmp_path / "log", deadline=90, stall=2
        )

"""The whole chain on a laptop: data -> tiny model -> cold-start SFT -> RL -> evaluation -> report.

    python -m parallel_r1.quickstart [--smoke] [--seed N] [--fresh] [--out DIR]

Every stage is a command of its own under a watchdog, with its log in ``OUT/logs``. A finished stage leaves
``OUT/stages/NAME.json``; running again continues after the last one, and SFT and RL resume from their checkpoints.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from omegaconf import OmegaConf

from parallel_r1 import record
from parallel_r1.environment import CPU
from parallel_r1.leftovers import StageError
from parallel_r1.report import replacing
from parallel_r1.report.report import headline, write_report
from parallel_r1.run_lock import RunLock, RunLockError
from parallel_r1.supervise import StageResult, run_stage
from parallel_r1.training import fidelity
from parallel_r1.training.compose import compose

ROOT = Path(__file__).resolve().parents[2]
# Written by verl, Ray or vLLM when a process that the run needs has died; the run would wait for it for ever.
FATAL = ("EngineDeadError", "EngineCore failed to start", "Worker failed with error", "RayActorError", "ActorDiedError")


@dataclass(frozen=True)
class Settings:
    """What distinguishes one quickstart from another; saved in the run folder and compared on the next start."""

    seed: int
    train_problems: int
    heldout_problems: int
    sft_steps: int
    rl_steps: int
    switch_step: int
    save_every: int  # RL checkpoints
    rollout_prompts: int


def settings(seed: int, smoke: bool) -> Settings:
    if smoke:
        return Settings(seed, 256, 32, 4, 4, 3, 2, 4)
    return Settings(seed, 2400, 768, 340, 28, 21, 7, 12)


@dataclass(frozen=True)
class Stage:
    """One step of the chain. ``expected`` is seconds on two cores, for the progress line only."""

    name: str
    title: str
    command: Sequence[str]
    expected: float
    metrics: str | None = None  # prefix of the metrics files whose lines count as progress
    steps: int = 0
    environment: dict[str, str] | None = None


def stages(out: Path, s: Settings, overrides: Sequence[str]) -> list[Stage]:
    """The commands of the chain, in order."""
    python, data, model = sys.executable, out / "data", out / "model"
    sft = out / "sft" / f"global_step_{s.sft_steps}" / "huggingface"
    rl = out / "rl" / f"global_step_{s.rl_steps}" / "actor" / "huggingface"
    seed = str(s.seed)
    variant = [key for key in overrides if key.startswith(("parallel_r1.variant=", "parallel_r1.fidelity="))]
    micro = min(64, s.rollout_prompts // 2 * 8)  # verl wants mini-batches to be multiples of it; 8 rollouts a prompt

    def evaluate(name: str, checkpoint: Path) -> Stage:
        command = [python, "-m", "parallel_r1.evaluation.generate", "quickstart_rl", "--model", str(checkpoint)]
        command += ["--problems", str(data / "heldout.parquet"), "--out", str(out / f"{name}_samples.jsonl")]
        title = f"evaluation of the {name.upper()} checkpoint"
        command += ["--seed", seed, *[key for key in overrides if key.startswith("parallel_r1.")]]
        return Stage(f"evaluate_{name}", title, command, 30, environment=CPU | FORK)

    return [
        Stage(
            "data",
            "problems and cold-start traces",
            [python, str(ROOT / "data_prep/arithmetic.py"), "--out", str(data), "--seed", seed]
            + ["--train", str(s.train_problems), "--heldout", str(s.heldout_problems)],
            10,
        ),
        Stage(
            "model",
            "tiny Qwen3 with six tags",
            [python, str(ROOT / "data_prep/tiny_model.py"), "--out", str(model), "--seed", seed]
            + ["--corpus", str(data / "cold_start.parquet")],
            15,
        ),
        Stage(
            "sft",
            "cold-start SFT",
            [python, "-m", "parallel_r1.training.sft", "quickstart_sft"]
            + [f"data.train_files={data / 'cold_start.parquet'}", f"model.path={model}", f"trainer.seed={seed}"]
            + [f"trainer.default_local_dir={out / 'sft'}", f"trainer.total_training_steps={s.sft_steps}"]
            + [f"trainer.save_freq={max(1, s.sft_steps // 2)}", *variant],
            120,
            metrics="sft",
            steps=s.sft_steps,
            environment=CPU,
        ),
        Stage(
            "rl",
            "RL: GRPO, S2, then accuracy only",
            [python, "-m", "parallel_r1.training.rl", "quickstart_rl"]
            + [f"data.train_files={data / 'train.parquet'}", f"data.val_files={data / 'heldout.parquet'}"]
            + [f"data.seed={seed}", f"data.train_batch_size={s.rollout_prompts}"]
            + [f"actor_rollout_ref.actor.ppo_mini_batch_size={s.rollout_prompts // 2}"]
            + [f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={micro}"]
            + [f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={micro}"]
            + [f"actor_rollout_ref.model.path={sft}", f"actor_rollout_ref.rollout.seed={seed}"]
            + [f"trainer.default_local_dir={out / 'rl'}", f"trainer.rollout_data_dir={out / 'rollouts'}"]
            + [f"trainer.total_training_steps={s.rl_steps}", f"trainer.save_freq={s.save_every}"]
            + [f"parallel_r1.reward.switch_step={s.switch_step}", *overrides],
            220,
            metrics="rl",
            steps=s.rl_steps,
            environment=CPU,
        ),
        evaluate("sft", sft),
        evaluate("rl", rl),
    ]


FORK = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}  # the engine process starts without importing everything again


class Progress:
    """One line per stage: rewritten in place on a terminal; elsewhere a line at its start and at its end."""

    def __init__(self, number: int, total: int, stage: Stage):
        self.head, self.stage = f"[{number}/{total}] {stage.title}", stage
        self.live = sys.stdout.isatty()
        if not self.live:
            print(f"{self.head}: started, expected {_minutes(stage.expected)}", flush=True)

    def tick(self, elapsed: float, steps: int) -> None:
        if self.live:
            done = f", step {steps}/{self.stage.steps}" if self.stage.steps else ""
            line = f"{self.head}: {_minutes(elapsed)} of about {_minutes(self.stage.expected)}{done}"
            print(f"\r\033[K{line}", end="", flush=True)

    def end(self, seconds: float) -> None:
        self.clear()
        print(f"{self.head}: done in {_minutes(seconds)}", flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r\033[K", end="", flush=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def count_lines(folder: Path, prefix: str) -> int:
    """Training steps logged so far, over all starts of a stage."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(f"{prefix}-*.jsonl"))


def run(out: Path, s: Settings, *, stall: float, deadline: float, overrides: Sequence[str]) -> dict:
    """Run the stages that are not done, then write the report; returns it.

    Raises:
        StageError: a stage failed, hung or died; its message names the log.
    """
    metrics, logs, done_folder = (out / name for name in ("metrics", "logs", "stages"))
    for folder in (metrics, logs, done_folder):
        folder.mkdir(parents=True, exist_ok=True)
    chain = stages(out, s, overrides)
    for number, stage in enumerate(chain, 1):
        marker = done_folder / f"{stage.name}.json"
        if marker.is_file():
            print(f"[{number}/{len(chain) + 1}] {stage.title}: already done", flush=True)
            continue
        if stage.name == "model":
            shutil.rmtree(out / "model", ignore_errors=True)  # half a model of a run that was cut off
        progress = Progress(number, len(chain) + 1, stage)
        result = _run(stage, metrics, logs, progress, stall=stall, deadline=deadline)
        seconds = result.seconds + _seconds_before(done_folder, stage.name)
        _write_json(marker, {"seconds": round(seconds, 1), "peak_memory_bytes": result.peak_memory_bytes})
        progress.end(result.seconds)
    return _report(out, s, chain, overrides)


def _run(stage: Stage, metrics: Path, logs: Path, progress: Progress, *, stall: float, deadline: float) -> StageResult:
    log = logs / f"{stage.name}.log"
    environment = dict(stage.environment or {})
    count: Callable[[], int] = lambda: count_lines(metrics, stage.metrics) if stage.metrics else 0  # noqa: E731
    if stage.metrics:
        started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        environment["VERL_FILE_LOGGER_PATH"] = str(metrics / f"{stage.metrics}-{started}.jsonl")
    before = count()

    def advanced() -> object:
        """Steps; until the first one of this start the log speaks, as start-up writes no steps."""
        steps = count()
        return steps if steps > before or not log.exists() else ("starting", log.stat().st_size)

    start = time.monotonic()
    try:
        return run_stage(
            stage.name,
            stage.command,
            log=log,
            env=environment,
            deadline=deadline,
            stall=stall,
            progress=advanced if stage.metrics else None,
            on_tick=lambda elapsed: progress.tick(elapsed, count()),
            fatal=FATAL,
        )
    except BaseException:
        progress.clear()
        _add_seconds(logs.parent / "stages", stage.name, time.monotonic() - start)
        raise


def _seconds_before(folder: Path, name: str) -> float:
    """Seconds that earlier, interrupted starts of a stage took."""
    path = folder / f"{name}.interrupted"
    return float(path.read_text()) if path.is_file() else 0.0


def _add_seconds(folder: Path, name: str, seconds: float) -> None:
    (folder / f"{name}.interrupted").write_text(str(_seconds_before(folder, name) + seconds))


def _report(out: Path, s: Settings, chain: Sequence[Stage], overrides: Sequence[str]) -> dict:
    results = {stage.name: json.loads((out / "stages" / f"{stage.name}.json").read_text()) for stage in chain}
    run_record = json.loads((out / "run.json").read_text())
    run_record["data"] = json.loads((out / "data" / "manifest.json").read_text())
    run_record["peak_memory_gib"] = round(max(r["peak_memory_bytes"] for r in results.values()) / 2**30, 2)
    report = write_report(
        out,
        sft_samples=out / "sft_samples.jsonl",
        rl_samples=out / "rl_samples.jsonl",
        metrics=sorted((out / "metrics").glob("rl-*.jsonl")),
        seconds={name: result["seconds"] for name, result in results.items()},
        run=run_record,
    )
    print(f"[{len(chain) + 1}/{len(chain) + 1}] report: {out / 'report.md'}\n{headline(report)}", flush=True)
    return report


def open_folder(out: Path, s: Settings, overrides: Sequence[str]) -> None:
    """Make or reopen the run folder.

    Raises:
        ValueError: it belongs to a run with another configuration, or to something else.
        OSError: it cannot be written.
    """
    wanted = {"settings": s.__dict__, "overrides": list(overrides)}
    path = out / "run.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if any(found.get(key) != value for key, value in wanted.items()):
            differing = [k for k, v in s.__dict__.items() if found.get("settings", {}).get(k) != v] or ["overrides"]
            raise ValueError(
                f"{out} holds a run of another configuration ({', '.join(differing)} differ); "
                "use --out with another folder, --fresh to delete it and start over, or the options of that run"
            )
        return
    foreign = [entry.name for entry in out.iterdir() if entry.name not in (".lock", "logs")]
    if foreign:
        raise ValueError(
            f"{out} holds files but no run ({', '.join(sorted(foreign)[:3])}, …); use --out with another folder"
        )
    parallel = fidelity.parallel_config(compose("quickstart_rl", overrides))
    wanted |= {"variant": parallel.variant, "fidelity": parallel.fidelity, "commit": record.git_commit(ROOT)}
    wanted |= {"versions": record.package_versions(), "machine": record.machine(), "started": _now()}
    _write_json(path, wanted)
    for name in ("quickstart_sft", "quickstart_rl"):
        config = compose(name, overrides if name == "quickstart_rl" else ())
        (out / f"{name}.yaml").write_text(OmegaConf.to_yaml(config))


def delete_run(out: Path) -> None:
    """Delete the run in ``out``, saying what goes; anything else in the folder stays.

    Raises:
        ValueError: the folder is not one of ours.
    """
    ours = {"data", "model", "sft", "rl", "rollouts", "metrics", "logs", "stages", "plots"}
    entries = sorted(entry for entry in out.iterdir() if entry.name != ".lock")
    if entries and not (out / "run.json").is_file():
        raise ValueError(f"{out} holds no run.json, so it is not a quickstart folder; nothing was deleted")
    doomed = [
        entry
        for entry in entries
        if entry.name in ours or entry.suffix in (".json", ".jsonl", ".yaml", ".md") and entry.is_file()
    ]
    if doomed:
        print(f"--fresh: deleting {', '.join(entry.name for entry in doomed)} in {out}", flush=True)
    for entry in doomed:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _write_json(path: Path, content: object) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="run folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="the same chain with minimal steps, for tests")
    parser.add_argument("--fresh", action="store_true", help="delete the run in the folder and start over")
    parser.add_argument(
        "--stall", type=float, default=240, help="seconds without progress after which a stage is ended"
    )
    parser.add_argument("--deadline", type=float, default=1800, help="seconds after which a stage is ended")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for RL; variant and fidelity for all")
    args = parser.parse_args()
    out = args.out.resolve()
    chosen = settings(args.seed, args.smoke)
    try:
        compose("quickstart_rl", args.overrides)  # a misspelt key must not cost minutes
        out.mkdir(parents=True, exist_ok=True)
        with RunLock(out):
            if args.fresh:
                delete_run(out)
            open_folder(out, chosen, args.overrides)
            run(out, chosen, stall=args.stall, deadline=args.deadline, overrides=args.overrides)
    except (StageError, RunLockError, ValueError, OSError) as error:
        sys.exit(f"quickstart: {error}")
    except KeyboardInterrupt:
        sys.exit("quickstart: interrupted; run it again to continue")


if __name__ == "__main__":
    main()

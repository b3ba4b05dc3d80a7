"""The report of a run: what RL changed on held-out problems, with curves, sampled rollouts and the run record.

Model output is hostile input in Markdown too: it appears only inside code fences longer than any run of backticks in
it, rendered by `report.tree`, so it can be neither HTML nor the end of its own fence.
"""

import html
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parallel_r1.evaluation.metrics import Interval, Sample, paired_gain, read_samples, summarise
from parallel_r1.report import replacing
from parallel_r1.report.plots import OVERVIEW, PANELS, TrainingMetrics, load_training_metrics, plot_training
from parallel_r1.report.tree import escape, render_tree, shorten
from parallel_r1.structure import REGIONS

VALID_TARGET = 0.9  # below this share of valid responses the headline says so
FEW_PROBLEMS = 30  # below this number the headline warns about its interval
_SAMPLING_SEED = 0
_ROUNDING = 1e-9  # sums of thirds that should be zero are not quite
_NONE = "–"


def write_report(
    out: Path,
    *,
    sft_samples: Path,
    rl_samples: Path,
    metrics: Sequence[Path],
    seconds: Mapping[str, float],
    run: Mapping[str, object],
) -> dict[str, Any]:
    """Write `report.json`, `report.md` and `plots/*.png` into `out` and return what is in `report.json`.

    Every file appears whole or not at all, and `report.json` comes last: where it exists the report is complete.

    Args:
        out: folder of the report; made where missing, an older report in it is replaced.
        sft_samples: evaluation samples of the checkpoint before RL (`evaluation.metrics` has the format).
        rl_samples: of the checkpoint after RL, on the same problems.
        metrics: files of verl's file logger from the RL run and its resumptions, oldest first.
        seconds: wall-clock time of every stage, in the order in which they ran.
        run: the record of the run: seed, commit, versions, machine, configuration.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: an input has another form, or the two evaluations hold different problems. Nothing is written.
    """
    before, after = read_samples(sft_samples), read_samples(rl_samples)
    gain = paired_gain(before, after)
    training = load_training_metrics(metrics)
    sft, rl = summarise(before), summarise(after)
    report = _plain(
        {
            "sft": sft,
            "rl": rl,
            "gain": {
                **asdict(gain),
                "intervals_overlap": Interval(**sft["accuracy"]).overlaps(Interval(**rl["accuracy"])),
            },
            "training": _training(training),
            "seconds": dict(seconds),
            "run": dict(run),
        }
    )
    plot_training(training, out / "plots")  # makes the folders
    _write(out / "report.md", _markdown(report, after))
    _write(out / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    return report


def headline(report: Mapping[str, Any]) -> str:
    """One sentence with the result, which says plainly where it is no improvement, uncertain, or of invalid format."""
    gain, sft, rl = report["gain"], report["sft"], report["rl"]
    if gain["low"] > _ROUNDING:
        verdict = "RL raised accuracy"
    elif gain["high"] < -_ROUNDING:
        verdict = "RL lowered accuracy"
    elif gain["mean"] > _ROUNDING:
        verdict = "RL did not measurably improve accuracy"
    else:
        verdict = "RL did not improve accuracy"
    caveats = []
    if gain["low"] <= _ROUNDING and gain["high"] >= -_ROUNDING:
        caveats.append("the interval of the gain includes zero")
    if gain["intervals_overlap"]:
        caveats.append("the two accuracy intervals overlap")
    if gain["n"] < FEW_PROBLEMS:
        caveats.append(f"{gain['n']} problems are too few to trust the intervals")
    for name, row in (("SFT", sft), ("RL", rl)):
        if row["valid_ratio"] < VALID_TARGET:
            caveats.append(f"only {_percent(row['valid_ratio'])} of the {name} responses have a valid format")
    return (
        f"{verdict} on {gain['n']} held-out {'problem' if gain['n'] == 1 else 'problems'}: "
        f"{_percent(sft['accuracy']['mean'])} before, {_percent(rl['accuracy']['mean'])} after, a difference of "
        f"{100 * gain['mean']:+.1f} points (95% interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
        + "".join(f"; {caveat}" for caveat in caveats)
        + "."
    )


def pick_rollouts(samples: Sequence[Sample], seed: int = _SAMPLING_SEED) -> list[tuple[str, Sample | None]]:
    """Three different samples to show, each with what it was picked as; None where there is no such sample.

    The choice depends on the set of samples and the seed alone, not on the order of the file.
    """
    rng = random.Random(seed)
    left = sorted(samples, key=lambda s: (s["index"], s["sample"]))
    picked: list[tuple[str, Sample | None]] = []
    for name, wanted in (
        ("correct, with a block", lambda s: s["correct"] and s["has_block"]),
        ("incorrect", lambda s: not s["correct"]),
        ("one more", lambda s: True),
    ):
        candidates = [s for s in left if wanted(s)]
        choice = rng.choice(candidates) if candidates else None
        left = [s for s in left if s is not choice]
        picked.append((name, choice))
    return picked


def fence(content: str, info: str = "text") -> str:
    """`content` as a Markdown code block that nothing in `content` can end."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))
    return f"{ticks}{info}\n{content}\n{ticks}"


def _training(training: TrainingMetrics) -> dict[str, Any]:
    mismatch = {name: training.series(f"mismatch/{name}_max")[1] for name in REGIONS}
    return {
        "steps": training.last_step(),
        "switch_step": training.switch_step(),
        "mismatch": {name: float(values.max()) if values.size else None for name, values in mismatch.items()},
        "skipped_lines": training.skipped_lines,
    }


def _markdown(report: Mapping[str, Any], rl_samples: Sequence[Sample]) -> str:
    curves = ", ".join(f"[{panel.title.lower()}](plots/{panel.file})" for panel in PANELS)
    parts = ["# Parallel-R1 report", headline(report), "## Held-out problems", _results(report)]
    parts += ["Brackets hold 95% bootstrap intervals over problems; critical path and tokens are means per response."]
    parts += ["## Training", f"![Training curves](plots/{OVERVIEW})", f"Each curve alone: {curves}."]
    parts += [_training_lines(report["training"]), "## Time", _times(report["seconds"])]
    parts += ["## Sampled rollouts after RL", f"Drawn with seed {_SAMPLING_SEED}; `!` marks a tag that does not fit."]
    for name, sample in pick_rollouts(rl_samples):
        parts += _rollout(name, sample)
    parts += ["## Run record", fence(json.dumps(report["run"], indent=2, allow_nan=False), "json")]
    return "\n\n".join(parts) + "\n"


def _results(report: Mapping[str, Any]) -> str:
    header = "Checkpoint|Accuracy|Valid format|Parallel ratio|Paths per block|Tokens|Critical path|Critical share"
    rows = [header.split("|"), ["---"] + ["---:"] * 7]
    for name in ("sft", "rl"):
        row, accuracy = report[name], report[name]["accuracy"]
        interval = f"{_percent(accuracy['mean'])} [{_percent(accuracy['low'])}, {_percent(accuracy['high'])}]"
        shares = [_percent(row["valid_ratio"]), _percent(row["parallel_ratio"])]
        numbers = [_number(row["mean_paths_per_block"], 2), _number(row["tokens"]), _number(row["critical_tokens"])]
        rows.append([name.upper(), interval, *shares, *numbers, _percent(row["critical_share"])])
    return _table(rows)


def _training_lines(training: Mapping[str, Any]) -> str:
    steps, switch, skipped = training["steps"], training["switch_step"], training["skipped_lines"]
    lines = [f"- Last step: {_NONE if steps is None else steps}"]
    lines += [f"- Mid-training switch to the accuracy reward: {'none' if switch is None else f'step {switch}'}"]
    shown = {
        name: "none logged" if value is None else f"{value:.2g} nats" for name, value in training["mismatch"].items()
    }
    regions = ", ".join(f"{name} {value}" for name, value in shown.items())
    lines += [f"- Largest log-probability difference between engine and trainer: {regions}"]
    if skipped:
        lines += [f"- Torn lines left out of the metrics (the run was killed while writing): {skipped}"]
    return "\n".join(lines)


def _times(seconds: Mapping[str, float | None]) -> str:
    total = sum(value for value in seconds.values() if value is not None)
    rows = [["Stage", "Seconds"], ["---", "---:"]]
    rows += [[_cell(stage), _number(value)] for stage, value in seconds.items()]
    return _table([*rows, ["total", _number(total)]])


def _rollout(name: str, sample: Sample | None) -> list[str]:
    if sample is None:
        return [f"### {name.capitalize()}", "The evaluation has no such response."]
    content = [f"prompt: {escape(shorten(sample['prompt'], 200))}"]
    content += [f"ground truth: {escape(shorten(sample['ground_truth'], 200))}", render_tree(sample["response"])]
    title = f"### {name.capitalize()}: problem {sample['index']}, sample {sample['sample']}, grade {sample['grade']}"
    return [title, fence("\n".join(content))]


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f}%"


def _number(value: float | None, digits: int = 1) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"


def _cell(text: str) -> str:
    """`text` as literal text of a table cell."""
    return html.escape(re.sub(r"([\\`*_\[\]|~])", r"\\\1", escape(text)))


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: no NaN or infinity (None instead), NumPy numbers as Python's, the rest as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")

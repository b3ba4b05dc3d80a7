"""Numbers from evaluation samples: accuracy with an interval, valid format, parallel ratio, critical path.

A sample is one line of the samples file, with the fields of `_FIELDS`: `index` is the problem, `sample` counts
the responses to it, and `critical_tokens` counts the trunk, the summaries and the longest path of every block. Apart
from `read_samples` everything is a pure function of a list of samples. It needs NumPy alone, and returns plain numbers
or None, never NaN.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Sample = Mapping[str, Any]

GRADES = ("ok", "wrong", "unparseable")

_FIELDS: dict[str, type] = {
    "index": int,
    "sample": int,
    "prompt": str,
    "response": str,
    "ground_truth": str,
    "correct": bool,
    "grade": str,
    "has_block": bool,
    "violations": list,
    "paths_per_block": list,
    "tokens": int,
    "critical_tokens": int,
    "truncated": bool,
    "forced_closers": int,
}
_DRAWS_PER_CHUNK = 1 << 21  # resampled problems held at once: 24 MiB, whatever the number of problems


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; `n` is the number of independent units, which is problems, not responses."""

    mean: float
    low: float
    high: float
    n: int

    def overlaps(self, other: "Interval") -> bool:
        """Whether the two intervals share at least one point."""
        return max(self.low, other.low) <= min(self.high, other.high)


def bootstrap_mean(
    values: Sequence[float],
    groups: Sequence[int] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean over problems with a percentile bootstrap interval that resamples whole problems.

    Several responses to one problem are not independent, so they are averaged first (this is `mean@k`: every problem
    weighs the same) and the problems are then drawn with replacement. The order of the values does not matter.
    Where the problems do not vary, and with a single problem, the interval is the point itself: the bootstrap knows
    only what it has seen, so read `n` beside it.

    Args:
        values: (responses,) numbers, for accuracy 0 or 1.
        groups: (responses,) problem of each value; None: every value is a problem of its own.
        confidence: share of the distribution inside the interval, between 0 and 1.
        resamples: number of bootstrap resamples.
        seed: of the resampling; the same arguments give the same interval.

    Raises:
        ValueError: no values, a value that is not finite, lengths that differ, or a setting out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3 (percentile interval).
    """
    flat = np.asarray(values, dtype=np.float64)
    if flat.ndim != 1 or flat.size == 0:
        raise ValueError(f"bootstrap_mean: found values of shape {flat.shape}; give a list of at least one number")
    if not np.isfinite(flat).all():
        at = int(np.flatnonzero(~np.isfinite(flat))[0])
        raise ValueError(f"bootstrap_mean: values[{at}] is {flat[at]}; leave out or repair what is not a finite number")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"bootstrap_mean: found confidence={confidence}, resamples={resamples}; "
            "confidence lies between 0 and 1 and resamples is at least 1"
        )
    # Sorted, so that the same problems in another order draw the same resamples.
    means = np.sort(flat if groups is None else _mean_per_group(flat, groups)[1])
    n = int(means.size)
    if means[0] == means[-1]:
        return Interval(float(means[0]), float(means[0]), float(means[0]), n)
    rng = np.random.default_rng(seed)
    chunk = max(1, _DRAWS_PER_CHUNK // n)
    resampled = np.empty(resamples)
    for start in range(0, resamples, chunk):
        drawn = rng.integers(0, n, size=(min(chunk, resamples - start), n), dtype=np.int32)
        resampled[start : start + len(drawn)] = means[drawn].mean(axis=1)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(means.mean()), float(low), float(high), n)


def paired_gain(before: Sequence[Sample], after: Sequence[Sample], **bootstrap: Any) -> Interval:
    """Gain in accuracy from `before` to `after` on the same problems: mean of the per-problem differences.

    Pairing removes the spread between easy and hard problems, so this interval is narrower than what the two separate
    intervals suggest. `bootstrap` goes to `bootstrap_mean`.

    Raises:
        ValueError: the two lists do not hold the same problems; the message names the difference.
    """
    problems, accuracies = [], []
    for samples in (before, after):
        _check(samples)
        groups = [s["index"] for s in samples]
        index, means = _mean_per_group(np.array([float(s["correct"]) for s in samples]), groups)
        problems.append({s["index"]: s["ground_truth"] for s in samples})
        accuracies.append(dict(zip(index.tolist(), means.tolist(), strict=True)))
    _check_same_problems(*problems)
    return bootstrap_mean([accuracies[1][i] - accuracies[0][i] for i in sorted(problems[0])], **bootstrap)


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """One row of a results table from the samples of one checkpoint.

    Shares are of all responses: `valid_ratio` no violation of the format (a response without a block can be valid),
    `parallel_ratio` at least one block, `truncated_ratio` cut off by the length limit. `valid_block_ratio` is the
    valid share of the responses with a block and `mean_paths_per_block` is over blocks; both are None where there is
    no block. `tokens` and `critical_tokens` are means per response, `critical_share` is the ratio of their totals (1:
    nothing ran in parallel; None: no tokens), `forced_closers` is a total.

    Raises:
        ValueError: no samples, or a sample without a field or with a value of the wrong type.

    Source: the paper's analysis figures for the parallel ratio; the others are ours.
    """
    _check(samples)
    with_block = [s for s in samples if s["has_block"]]
    paths = [count for s in samples for count in s["paths_per_block"]]
    tokens = sum(s["tokens"] for s in samples)
    critical = sum(s["critical_tokens"] for s in samples)
    grades = Counter(s["grade"] for s in samples)
    accuracy = bootstrap_mean([float(s["correct"]) for s in samples], [s["index"] for s in samples])
    return {
        "samples": len(samples),
        "accuracy": asdict(accuracy),
        "valid_ratio": _ratio(sum(not s["violations"] for s in samples), len(samples)),
        "valid_block_ratio": _ratio(sum(not s["violations"] for s in with_block), len(with_block)),
        "parallel_ratio": _ratio(len(with_block), len(samples)),
        "mean_paths_per_block": _ratio(sum(paths), len(paths)),
        "tokens": _ratio(tokens, len(samples)),
        "critical_tokens": _ratio(critical, len(samples)),
        "critical_share": _ratio(critical, tokens),
        "truncated_ratio": _ratio(sum(s["truncated"] for s in samples), len(samples)),
        "forced_closers": sum(s["forced_closers"] for s in samples),
        "grades": {grade: grades[grade] for grade in GRADES},
    }


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Samples of one evaluation, in file order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not JSON (an evaluation that was cut off), a field missing or of the wrong type, the
            same response twice, or no sample at all.
    """
    samples = []
    with open(path, "rb") as lines:  # bytes: a torn line may end inside a character
        for number, line in enumerate(lines, start=1):
            try:
                samples.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{path}: line {number} is not JSON ({error}); the evaluation was cut off, run it again"
                ) from error
    _check(samples, where=str(path))
    repeated = [key for key, count in Counter((s["index"], s["sample"]) for s in samples).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{path}: found problem {repeated[0][0]}, sample {repeated[0][1]} more than once ({len(repeated)} such "
            "responses); two evaluations went to one file, run the evaluation again into an empty folder"
        )
    return samples


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean_per_group(values: np.ndarray, groups: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(responses,) values -> the (problems,) problems in rising order and the mean of each."""
    if len(groups) != len(values):
        raise ValueError(f"bootstrap_mean: found {len(values)} values and {len(groups)} groups; give one per value")
    index, inverse, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return index, np.bincount(inverse, weights=values) / counts


def _check(samples: Sequence[Sample], where: str = "evaluation samples") -> None:
    if not samples:
        raise ValueError(f"{where}: found no samples; run the evaluation first")
    for number, sample in enumerate(samples, start=1):
        if not isinstance(sample, Mapping):
            raise ValueError(f"{where}: sample {number} is a {type(sample).__name__}, not an object; write it again")
        for field, kind in _FIELDS.items():
            value = sample.get(field)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                found = f"{value!r:.60}" if field in sample else "nothing"
                raise ValueError(f"{where}: sample {number}, {field!r}: found {found}, expected {kind.__name__}")
        if sample["grade"] not in GRADES:
            raise ValueError(f"{where}: sample {number}, 'grade': found {sample['grade']!r}, expected one of {GRADES}")


def _check_same_problems(before: Mapping[int, str], after: Mapping[int, str]) -> None:
    advice = "evaluate both checkpoints on the same problems"
    for one, other, name in ((before, after, "first"), (after, before, "second")):
        only = sorted(one.keys() - other.keys())
        if only:
            shown = ", ".join(map(str, only[:5])) + (", ..." if len(only) > 5 else "")
            raise ValueError(f"paired gain: {len(only)} problems only in the {name} evaluation ({shown}); {advice}")
    changed = sorted(i for i in before if before[i] != after[i])
    if changed:
        i = changed[0]
        raise ValueError(
            f"paired gain: {len(changed)} problems have another ground truth in the second evaluation, such as problem "
            f"{i}: {before[i]!r:.60} against {after[i]!r:.60}; {advice}"
        )

"""What a training step logs about parallel thinking: pure functions on lists and arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from parallel_r1.rewards.grading import STATUSES
from parallel_r1.structure import PATH, REGIONS, annotate, regions
from parallel_r1.tags import TagIds


def rollout_metrics(infos: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> dict[str, float]:
    """Metrics of one step from the ``reward_extra_info`` of its rollouts (see :mod:`parallel_r1.rewards.manager`)."""
    mean = {name: float(np.mean([info[name] for info in infos])) for name in ("acc", "has_block", "valid")}
    positions = [info["position"] for info in infos if info["position"] is not None]
    paths = [count for info in infos for count in info["paths_per_block"]]
    tokens = sum(info["tokens"] for info in infos)
    grades = Counter(info["grade"] for info in infos)
    kinds = Counter(violation.split(" at character")[0] for info in infos for violation in info["violations"])
    metrics = {
        "reward/score": float(np.mean(scores)),
        "reward/accuracy": mean["acc"],
        "parallel/ratio": mean["has_block"],
        "parallel/valid_ratio": mean["valid"],
        "parallel/critical_share": sum(info["critical_tokens"] for info in infos) / tokens,
        "rollout/tokens": tokens / len(infos),
        "rollout/truncated_ratio": float(np.mean([info["truncated"] for info in infos])),
        "rollout/forced_closers": float(np.sum([info["forced_closers"] for info in infos])),
        "rollout/failed_paths": float(np.sum([info["failed_paths"] for info in infos])),
    }
    if positions:
        metrics["parallel/position"] = float(np.mean(positions))
    if paths:
        metrics["parallel/paths_per_block"] = float(np.mean(paths))
    metrics |= {f"grade/{status}": grades[status] / len(infos) for status in STATUSES}
    metrics["grade/ungraded"] = 1 - (grades["ok"] + grades["wrong"]) / len(infos)
    for name in sorted({name for info in infos for name in info["terms"]}):
        metrics[f"reward_terms/{name}"] = float(np.mean([info["terms"].get(name, 0.0) for info in infos]))
    for source in sorted({info["data_source"] for info in infos}):
        correct = [info["acc"] for info in infos if info["data_source"] == source]
        metrics[f"reward/accuracy/{source}"] = float(np.mean(correct))
    metrics |= {f"violation/{kind}": count / len(infos) for kind, count in kinds.items()}
    return metrics


def mismatch_metrics(
    rows: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]], tags: TagIds
) -> dict[str, float]:
    """|engine - trainer| log-probability of sampled tokens in nats: mean and maximum, over all and per region.

    Regions are those of :func:`parallel_r1.structure.regions`: trunk before the first block, paths, summaries, and the
    trunk after a block. "first_path" are the first paths of blocks, which have no earlier sibling. A region without a
    sampled token is left out.

    Args:
        rows: per response ``(response_ids, sampled, engine_log_probs, trainer_log_probs)``, each (response_len,).
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("all", "first_path", *REGIONS)}
    for ids, sampled, engine, trainer in rows:
        structure = annotate(ids, tags)
        sampled = np.asarray(sampled, dtype=bool)
        region = regions(ids, structure, tags)
        gap = np.abs(np.asarray(engine, dtype=np.float64) - np.asarray(trainer, dtype=np.float64))
        parts["all"].append(gap[sampled])
        for index, name in enumerate(REGIONS):
            parts[name].append(gap[sampled & (region == index)])
        first = (region == PATH) & (structure.hidden_start == structure.hidden_end)
        parts["first_path"].append(gap[sampled & first])
    metrics: dict[str, float] = {}
    for name, gaps in parts.items():
        values = np.concatenate(gaps) if gaps else np.empty(0)
        if len(values):
            metrics[f"mismatch/{name}_max"] = float(values.max())
            metrics[f"mismatch/{name}_mean"] = float(values.mean())
    return metrics


def mismatch_warning(metrics: Mapping[str, float], bound: float) -> str | None:
    """What to say about a step whose mean mismatch exceeds ``bound`` nats in some region; None if it does in none."""
    over = {name: metrics.get(f"mismatch/{name}_mean", 0.0) for name in REGIONS}
    over = {name: value for name, value in over.items() if not value <= bound}  # NaN is over every bound
    if not over:
        return None
    found = ", ".join(f"{name} {value:.3g}" for name, value in over.items())
    return (
        f"engine and trainer disagree: mean |log-prob difference| is {found} nats, above "
        f"parallel_r1.mismatch_bound={bound}; the sampled policy is not the trained one"
    )

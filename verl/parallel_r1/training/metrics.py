"""What a training step logs about parallel thinking: pure functions on lists and arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from parallel_r1.structure import annotate
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
    }
    if positions:
        metrics["parallel/position"] = float(np.mean(positions))
    if paths:
        metrics["parallel/paths_per_block"] = float(np.mean(paths))
    metrics |= {f"grade/{status}": count / len(infos) for status, count in grades.items()}
    metrics |= {f"violation/{kind}": count / len(infos) for kind, count in kinds.items()}
    return metrics


def mismatch_metrics(
    rows: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]], tags: TagIds
) -> dict[str, float]:
    """|engine - trainer| log-probability of sampled tokens, mean and maximum.

    Split by whether both sides saw the same context. The engine decodes every path without its siblings; a causal
    trainer lets later paths see the earlier ones, so exactly the later paths differ by design ("other"). Trunk, first
    paths, summaries and everything after a block must agree to rounding ("same").

    Args:
        rows: per response ``(response_ids, mask, engine_log_probs, trainer_log_probs)``, each (response_len,).
    """
    differences: dict[str, list[np.ndarray]] = {"same": [], "other": []}
    for ids, mask, engine, trainer in rows:
        structure = annotate(ids, tags)
        sampled = np.asarray(mask, dtype=bool)
        same = structure.hidden_start == structure.hidden_end
        gap = np.abs(np.asarray(engine, dtype=np.float64) - np.asarray(trainer, dtype=np.float64))
        differences["same"].append(gap[sampled & same])
        differences["other"].append(gap[sampled & ~same])
    metrics: dict[str, float] = {}
    for name, parts in differences.items():
        values = np.concatenate(parts) if parts else np.empty(0)
        if len(values):
            metrics[f"mismatch/{name}_context_max"] = float(values.max())
            metrics[f"mismatch/{name}_context_mean"] = float(values.mean())
    return metrics

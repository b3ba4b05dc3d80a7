"""Truth at start: before a run begins, every gold answer must grade as correct against itself."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from parallel_r1.rewards import math_pool
from parallel_r1.rewards.grading import gold_problem, reference

MAX_BAD_SHARE = 0.005
LISTED = 20


def find_problems(golds: Iterable[str], grader: str) -> dict[str, str]:
    """Gold answers that cannot be graded, each with the reason.

    Args:
        grader: "robust" or "reference".
    """
    problems = {}
    for gold in dict.fromkeys(map(str, golds)):
        if grader == "robust":
            problem = gold_problem(gold)
        else:
            status = reference(f"Final Answer: {gold}", gold).status
            problem = None if status == "ok" else f"graded against itself it is {status}"
        if problem:
            problems[gold] = problem
    return problems


def check(config: DictConfig, grader: str) -> None:
    """Check the gold answers of an RL configuration's data files; problems are listed on stderr.

    Raises:
        ValueError: more than 0.5% of the rows of a file have a gold answer that cannot be graded, or a file has none.
    """
    try:
        for key in ("train_files", "val_files"):
            names = config.data[key]
            for name in dict.fromkeys([names] if isinstance(names, str) else names):
                _check_file(Path(name).expanduser(), grader)
    finally:
        math_pool.release()  # a run lasts days, and its rewards are computed in other processes


def _check_file(path: Path, grader: str) -> None:
    frame = pd.read_parquet(path)
    if "reward_model" not in frame or not all(row and row.get("ground_truth") for row in frame["reward_model"]):
        raise ValueError(f"{path}: a row has no reward_model.ground_truth; {len(frame)} rows need one")
    golds = [str(row["ground_truth"]) for row in frame["reward_model"]]
    problems = find_problems(golds, grader)
    bad = [(row, gold) for row, gold in enumerate(golds) if gold in problems]
    for row, gold in bad[:LISTED]:
        print(f"{path}: row {row}: gold answer {gold[:80]!r}: {problems[gold]}", file=sys.stderr)
    if len(bad) > LISTED:
        print(f"{path}: and {len(bad) - LISTED} more", file=sys.stderr)
    if len(bad) > MAX_BAD_SHARE * len(golds):
        raise ValueError(
            f"{path}: {len(bad)} of {len(golds)} gold answers cannot be graded, more than {MAX_BAD_SHARE:.1%}; the "
            "rows are listed above: repair or drop them"
        )

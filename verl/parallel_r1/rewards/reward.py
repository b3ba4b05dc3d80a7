"""Score one response: grade, format and the reward of the phase in force.

accuracy: +1 if correct, else -1.
parallel: 1.2 correct with a valid block, 1.0 correct without a block, -1 otherwise; a correct answer with a malformed
block gets -1.
Source: Parallel-R1 (arXiv 2509.07980), section 3.4; values as in the published code (`accuracy_parallel_interv`).
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel_r1.format import parse
from parallel_r1.rewards.grading import Grade, grade
from parallel_r1.rewards.schedule import Phase


@dataclass(frozen=True)
class RewardResult:
    """Reward of one response and what it was made from."""

    score: float
    grade: Grade
    violations: list[str]
    paths_per_block: list[int]

    @property
    def has_block(self) -> bool:
        return bool(self.paths_per_block)


def score(response: str, ground_truth: str, phase: Phase) -> RewardResult:
    """Reward of ``response`` in ``phase``.

    Raises:
        ValueError: the gold answer cannot be graded.
    """
    parsed = parse(response)
    verdict = grade(parsed.trunk_after, ground_truth)
    value = 1.0 if verdict.correct else -1.0
    if phase is Phase.PARALLEL and verdict.correct and parsed.paths_per_block:
        value = -1.0 if parsed.violations else 1.2
    return RewardResult(value, verdict, parsed.violations, parsed.paths_per_block)

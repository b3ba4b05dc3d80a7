"""Which reward is paid at which global step: a pure function of the step, so a resumed run continues it.

S2 alternates in windows of ten steps, eight for accuracy and two for the parallel reward; mid-training pays accuracy
only from ``switch_step`` on, when parallel thinking has served as an exploration scaffold.
Source: Parallel-R1 (arXiv 2509.07980), sections 3.4 (alternating reward) and 4.4 (mid-training scaffold).
"""

from __future__ import annotations

from enum import IntEnum

from parallel_r1.config import RewardConfig


class Phase(IntEnum):
    """Reward in force at a step; the value is what the metric ``reward/phase`` logs."""

    ACCURACY = 0
    PARALLEL = 1
    ACCURACY_ONLY = 2


def phase(step: int, config: RewardConfig) -> Phase:
    """Phase of global step ``step`` (the first step is 1)."""
    if config.switch_step is not None and step >= config.switch_step:
        return Phase.ACCURACY_ONLY
    if (step - 1) % config.window < config.accuracy_steps:
        return Phase.ACCURACY
    return Phase.PARALLEL

"""Which recipe pays at which global step: a pure function of the step, so a resumed run continues it.

A recipe may alternate (S2: windows of ten steps, eight for accuracy, two for the parallel reward). Mid-training pays
another recipe for good from ``switch_step`` on, when parallel thinking has served as an exploration scaffold.
Source: Parallel-R1 (arXiv 2509.07980), sections 3.4 (alternating reward) and 4.4 (mid-training scaffold).
"""

from __future__ import annotations

from enum import IntEnum

from parallel_r1.config import RewardConfig
from parallel_r1.rewards import recipes

VALIDATION_RECIPE = "accuracy"  # whatever training pays, so that a score means the same at every step


class Phase(IntEnum):
    """Where in its schedule a reward is; the value is what the metric ``reward/phase`` logs."""

    ACCURACY = 0  # the first turn of a recipe that alternates, or a recipe that does not
    PARALLEL = 1  # a later turn
    ACCURACY_ONLY = 2  # switched for good


def scheduled(step: int, config: RewardConfig) -> tuple[str, Phase]:
    """Name of the recipe that pays at global step ``step`` (the first step is 1), and the phase.

    Raises:
        RecipeError: an unknown recipe.
    """
    if config.switch_step is not None and step >= config.switch_step:
        return recipes.in_force(config.switch_recipe, step), Phase.ACCURACY_ONLY
    turn = recipes.turn(config.recipe, step)
    return recipes.in_force(config.recipe, step), Phase.PARALLEL if turn else Phase.ACCURACY


def check(config: RewardConfig) -> None:
    """Load every recipe that ``config`` names.

    Raises:
        RecipeError: one that is unknown or makes no sense.
    """
    for name in (config.recipe, config.switch_recipe, VALIDATION_RECIPE):
        recipes.load(name)

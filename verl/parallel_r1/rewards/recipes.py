"""Rewards as YAML of a few lines: which cases pay what, what is added, and which recipe is in force at which step.

A recipe of ``configs/rewards`` (its path without ``.yaml`` is its name) has one of

- ``cases``: the first case whose conditions all hold pays;
- ``base``: the name of a recipe whose cases it takes over;
- ``alternate``: recipes by turns, each for a number of steps;

and may ``add`` terms: ``times`` x a quantity where the conditions hold, decaying with ``exp(-step / decay_steps)``.
Conditions and quantities are those of :mod:`parallel_r1.rewards.terms`. A pure function of response and global step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from parallel_r1.rewards.terms import CONDITIONS, QUANTITIES, Response

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "rewards"


class RecipeError(ValueError):
    """A recipe that does not exist or does not make sense; one line."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Conditions = list[Literal[CONDITIONS]]


class Case(_Part):
    conditions: Conditions = Field(default=[], alias="if")
    pay: float


class Term(_Part):
    name: str
    conditions: Conditions = Field(default=[], alias="if")
    of: Literal[QUANTITIES] = "one"
    times: float = 1.0
    decay_steps: Annotated[float, Field(gt=0)] | None = None


class Turn(_Part):
    steps: Annotated[int, Field(ge=1)]
    recipe: str


class Recipe(_Part):
    """See the module; ``reference`` is the form of the published verifier that belongs to it."""

    cases: list[Case] = []
    base: str | None = None
    alternate: list[Turn] = []
    offset: int = 0  # steps by which the turns are shifted to later
    add: list[Term] = []
    reference: Literal["math", "gsm8k"] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Recipe:
        kinds = [name for name in ("cases", "base", "alternate") if getattr(self, name)]
        if len(kinds) != 1:
            raise ValueError(f"needs one of cases, base and alternate, has {', '.join(kinds) or 'none'}")
        if self.cases and self.cases[-1].conditions:
            raise ValueError("the last case must have no condition, or some responses would be paid nothing")
        if self.alternate and self.add:
            raise ValueError("add belongs into the recipes that alternate")
        return self


def names() -> list[str]:
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


@lru_cache
def load(name: str) -> Recipe:
    """The recipe ``name`` with its base taken over.

    Raises:
        RecipeError: unknown name, unknown key, condition or quantity, or recipes that name each other in a circle.
    """
    return _load(name, ())


def _load(name: str, above: tuple[str, ...]) -> Recipe:
    if name in above:
        raise RecipeError(f"reward recipes in a circle: {' -> '.join([*above, name])}")
    if name not in names():
        via = f" (named by {above[-1]})" if above else ""
        raise RecipeError(f"unknown reward recipe {name!r}{via}; there are {', '.join(names())}")
    try:
        recipe = Recipe.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) or {})
    except (ValidationError, yaml.YAMLError) as error:
        raise RecipeError(f"reward recipe {name!r}: {_first(error)}") from error
    for turn in recipe.alternate:
        _load(turn.recipe, (*above, name))
    if recipe.base is None:
        return recipe
    base = _load(recipe.base, (*above, name))
    if base.alternate:
        raise RecipeError(f"reward recipe {name!r}: base {recipe.base!r} alternates; name the recipes it alternates")
    merged = {"cases": base.cases, "add": [*base.add, *recipe.add], "reference": recipe.reference or base.reference}
    return Recipe.model_construct(base=None, alternate=[], offset=0, **merged)


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    found = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in found["loc"])
    return f"{where}: {found['msg']}" if where else found["msg"]


def turn(name: str, step: int) -> int:
    """Index of the turn of recipe ``name`` at global step ``step`` (the first is 1); 0 if it does not alternate."""
    recipe = load(name)
    ends = list(accumulate(turn.steps for turn in recipe.alternate))
    return bisect_right(ends, (step - 1 - recipe.offset) % ends[-1]) if ends else 0


def in_force(name: str, step: int) -> str:
    """Name of the recipe without turns that pays at global step ``step`` where ``name`` is configured."""
    recipe = load(name)
    return in_force(recipe.alternate[turn(name, step)].recipe, step) if recipe.alternate else name


def pay(name: str, response: Response, step: int) -> dict[str, float]:
    """What recipe ``name`` pays for ``response`` at ``step``, by term; "case" is what its case pays."""
    recipe = load(in_force(name, step))

    def holds(conditions: list[str]) -> bool:
        return all(getattr(response, condition) for condition in conditions)

    terms = {"case": next(case.pay for case in recipe.cases if holds(case.conditions))}
    for term in recipe.add:
        decay = math.exp(-step / term.decay_steps) if term.decay_steps else 1.0
        terms[term.name] = term.times * decay * getattr(response, term.of) if holds(term.conditions) else 0.0
    return terms

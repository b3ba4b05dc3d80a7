"""Score one response with a reward recipe: grade, format, and what each term pays."""

from __future__ import annotations

from dataclasses import dataclass

from parallel_r1.format import check, parse
from parallel_r1.rewards import recipes
from parallel_r1.rewards.grading import Grade, reference, robust
from parallel_r1.rewards.terms import Response

GRADERS = ("robust", "reference")


@dataclass(frozen=True)
class RewardResult:
    """Reward of one response and what it was made from.

    Attributes:
        score: sum of ``terms``.
        terms: what each term paid; "case" is what the recipe's case paid.
        grade: verdict on the answer.
        recipe: name of the recipe that was in force.
        violations: of the format rule that goes with the grader.
        paths_per_block: closed paths of every block that was opened.
    """

    score: float
    terms: dict[str, float]
    grade: Grade
    recipe: str
    violations: list[str]
    paths_per_block: list[int]

    @property
    def has_block(self) -> bool:
        return bool(self.paths_per_block)


def score(recipe: str, response: str, ground_truth: str, global_step: int = 0, grader: str = "robust") -> RewardResult:
    """Reward of ``response`` by ``recipe`` (a file of ``configs/rewards``) at ``global_step``.

    Args:
        grader: "robust" with the strict format rule, or "reference": verifier and format rule of the published code.

    Raises:
        RecipeError: no such recipe.
        ValueError: no such grader, or no gold answer.
    """
    if grader not in GRADERS:
        raise ValueError(f"unknown grader {grader!r}; there are {', '.join(GRADERS)}")
    if not ground_truth or not str(ground_truth).strip():
        raise ValueError(f"the gold answer is {ground_truth!r}; there is nothing to grade against")
    name = recipes.in_force(recipe, global_step)
    parsed = parse(response)
    if grader == "robust":
        grade, violations = robust(response, str(ground_truth)), parsed.violations
    else:
        form = recipes.load(name).reference or "math"
        grade, violations = reference(response, str(ground_truth), form), check(response, "reference")
    terms = recipes.pay(name, Response(response, grade, violations), global_step)
    return RewardResult(sum(terms.values()), terms, grade, name, violations, parsed.paths_per_block)

"""Is the final answer right?

Numeric grading for problems whose gold answer is a number: the last ``Final Answer: …`` line of the trunk after the
last block is compared by value, exactly (integers, decimals, fractions, thousands separators). Nothing is evaluated,
and an answer longer than 64 characters is unparseable, so hostile output costs nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_ANSWER = re.compile(r"Final Answer:[ \t]*([^\n]*)")
_NUMBER = re.compile(r"[+-]?\d{1,40}(?:\.\d{1,20})?(?:/\d{1,20})?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
MAX_ANSWER_CHARS = 64


@dataclass(frozen=True)
class Grade:
    """Verdict on one response: ``status`` is "ok", "wrong" or "unparseable"; ``answer`` is what was extracted."""

    status: str
    answer: str | None

    @property
    def correct(self) -> bool:
        return self.status == "ok"


def to_number(text: str) -> Fraction | None:
    """Exact value of a written number, or None where ``text`` is not one."""
    text = _THOUSANDS.sub("", text.strip().strip("*$ ").rstrip("."))
    if len(text) > MAX_ANSWER_CHARS or not _NUMBER.fullmatch(text):
        return None
    numerator, _, denominator = text.partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / Fraction(denominator or 1)


def grade(trunk: str, ground_truth: str) -> Grade:
    """Grade the answer in ``trunk`` (text after the last block) against ``ground_truth``.

    Raises:
        ValueError: ``ground_truth`` is not a number; a data problem, not the model's.
    """
    gold = to_number(ground_truth)
    if gold is None:
        raise ValueError(f"gold answer {ground_truth!r} is not a number; this grader compares numbers only")
    answers = _ANSWER.findall(trunk)
    if not answers:
        return Grade("unparseable", None)
    answer = answers[-1].strip()[:MAX_ANSWER_CHARS]
    value = to_number(answers[-1])
    if value is None:
        return Grade("unparseable", answer)
    return Grade("ok" if value == gold else "wrong", answer)

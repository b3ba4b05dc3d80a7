"""Is the final answer right? Two graders.

:func:`robust` (ours) reads the answer from the trunk after the last block, whatever its form: ``Final Answer: ...``,
``\\boxed{...}``, a number alone on the last line; plain, LaTeX, fractions, units, thousands separators, Markdown, a
trailing period. Numbers are compared exactly; everything else by math-verify in processes that can be killed
(:mod:`parallel_r1.rewards.math_pool`). :func:`reference` decides as the published verifier does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from parallel_r1.format import parse

STATUSES = ("ok", "wrong", "unparseable", "timeout", "error")
MAX_ANSWER_CHARS = 500  # the longest gold answer of MATH has 159; beyond it is no answer

_NUMBER = re.compile(r"[+-]?(?:\d{1,40}(?:\.\d{0,20})?|\.\d{1,20})(?:e[+-]?\d{1,3}|/\d{1,20})?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\s*(?:\{(\d{1,20})\}\s*\{(\d{1,20})\}|(\d)\s*(\d))")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\[,!]|,\\!)(?=\d{3}(?:\D|$))")
_FINAL = re.compile(r"(?i)final\s+answer(?:\s+is)?\**\s*[:：]\s*\**([^\n]*)")
_ANSWER_IS = re.compile(r"(?i)\banswer\s+is\s*:?\s*([^\n]*)")
# what may follow a number without changing it; "2 million" and "2x" are other numbers
_TAIL_UNIT = re.compile(
    r"(?i)(?<=[\d}])(?:\s*\\[ ,]?)?\s*(?:"
    r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\?%|\^\s*\{?\\circ\}?|°|(?<=\s)[mgslh]"
    r"|(?!\s*(?:hundred|thousand|million|billion|trillion|dozen|pi|tau|squared|cubed|factorial|or|and|to)\b)"
    r"[a-z]{2}[a-z .]*"
    r")\s*$"
)
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"), ("*", "*"))


@dataclass(frozen=True)
class Grade:
    """Verdict on one response.

    Attributes:
        status: one of :data:`STATUSES`; "unparseable": no answer, or none that is mathematics; "timeout" and "error":
            the comparison ran past its deadline or failed.
        answer: what was extracted, cleaned; None if there was none.
    """

    status: str
    answer: str | None

    @property
    def correct(self) -> bool:
        return self.status == "ok"


def to_number(text: str) -> Fraction | None:
    """Exact value of a written number, or None where ``text`` is not one."""
    text = clean(text)
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        sign, *parts = fraction.groups()
        text = sign + "/".join(part for part in parts if part is not None)
    if len(text) > 100 or not _NUMBER.fullmatch(text):
        return None
    numerator, _, denominator = text.partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / Fraction(denominator or 1)


def clean(answer: str) -> str:
    """An answer without Markdown, math delimiters, a trailing period, currency signs and thousands separators."""
    text = answer.strip()
    while True:
        before = text
        text = text.strip().removesuffix(".").rstrip()
        for left, right in _WRAPPERS:
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right) - 1:
                text = text[len(left) : len(text) - len(right)].strip()
        if text == before:
            break
    text = text.strip("*").strip().removesuffix(".").replace("−", "-").removeprefix("\\$").removeprefix("$").strip()
    return _THOUSANDS.sub("", text)


def extract_answer(trunk: str) -> str | None:
    """The answer in ``trunk``: of ``Final Answer: ...``, ``\\boxed{...}`` and "the answer is ...", the last one; else a
    number alone on the last line; else None."""
    found: list[tuple[int, str]] = []
    for pattern in (_FINAL, _ANSWER_IS):
        matches = list(pattern.finditer(trunk))
        if matches and matches[-1].group(1).strip():
            found.append((matches[-1].start(1), matches[-1].group(1)))
    boxed = _last_boxed(trunk)
    if boxed is not None:
        found.append(boxed)
    if found:
        answer = max(found)[1]
        inner = _last_boxed(answer)
        return inner[1] if inner is not None else answer
    lines = [line for line in trunk.splitlines() if line.strip()]
    if lines and to_number(lines[-1]) is not None:
        return lines[-1]
    return None


def _last_boxed(text: str) -> tuple[int, str] | None:
    """Position and content of the last ``\\boxed{...}`` whose braces close."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    depth, begin = 0, text.index("{", start)
    for i in range(begin, min(len(text), begin + 2 * MAX_ANSWER_CHARS)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return start, text[begin + 1 : i]
    return None


def robust(response: str, ground_truth: str) -> Grade:
    """Grade the answer in the trunk of ``response`` after its last block; a path or a summary is never read."""
    answer = extract_answer(parse(response).trunk_after)
    if answer is None or not answer.strip() or len(answer) > MAX_ANSWER_CHARS:
        return Grade("unparseable", None if answer is None else answer.strip()[:MAX_ANSWER_CHARS] or None)
    answer = clean(answer)
    return Grade(_compare(answer, clean(ground_truth)), answer)


def _compare(answer: str, gold: str) -> str:
    numbers = [to_number(text) for text in (answer, gold)]
    if numbers[1] is not None and numbers[0] is None:
        numbers[0] = to_number(_TAIL_UNIT.sub("", answer))
    if None not in numbers:
        return "ok" if numbers[0] == numbers[1] else "wrong"
    if numbers[1] is None and _squeeze(answer) == _squeeze(gold):
        return "ok"
    from parallel_r1.rewards.math_pool import shared

    return shared().compare(answer, gold)


def _squeeze(text: str) -> str:
    """For answers that are words: without ``\\text{}``, spaces and case."""
    return re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", r"\1", text).replace(" ", "").lower()


def gold_problem(ground_truth: str) -> str | None:
    """Why an answer cannot be graded against ``ground_truth``; None if it can."""
    gold = clean(ground_truth)
    if not gold:
        return "empty"
    depth = 0
    for char in gold.replace("\\{", "").replace("\\}", ""):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth < 0:
            break
    if depth:
        return "braces do not match: it may have been cut"
    if to_number(gold) is not None or not re.search(r"[\\^_=+*/]|\d", gold):
        return None  # a number, or words
    from parallel_r1.rewards.math_pool import shared

    status = shared().compare(gold, gold)
    return None if status == "ok" else f"graded against itself it is {status}"


_REFERENCE = re.compile(r"(?i)Final Answer\s*:\s*([^\n]+)")
_REFERENCE_GSM8K = re.compile(r"Final Answer: (-?[0-9.,]+)")
REFERENCE_WINDOW = 300  # characters at the end of a response that the published verifier reads


def reference(response: str, ground_truth: str, form: str = "math") -> Grade:
    """Grade as the published verifier does: only ``Final Answer: ...`` in the last 300 characters counts.

    Args:
        form: "math" compares normalised LaTeX (verl's ``math_dapo``, which the published code changes in the pattern
            only), "gsm8k" compares digits.

    Raises:
        ValueError: another form.
    """
    window = response[-REFERENCE_WINDOW:]
    if form == "gsm8k":
        numbers = _REFERENCE_GSM8K.findall(window)
        answer = numbers[-1].replace(",", "") if numbers else None
        correct = answer == ground_truth
    elif form == "math":
        from verl.utils.reward_score.math_dapo import normalize_final_answer

        answers = _REFERENCE.findall(window)
        answer = normalize_final_answer(answers[-1]) if answers else None
        correct = answer == normalize_final_answer(ground_truth)
    else:
        raise ValueError(f"unknown form {form!r} of the reference grader; there are math and gsm8k")
    return Grade("unparseable" if answer is None else "ok" if correct else "wrong", answer)

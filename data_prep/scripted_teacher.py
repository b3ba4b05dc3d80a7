"""A scripted teacher: parallel-thinking traces for sums of two numbers of two digits.

Each block holds two genuinely different routes: adding the tens and then the ones of the second number, or adding
tens to tens and ones to ones. Their order is drawn at random, because paths that are decoded concurrently all start
from the same prefix: a model that always wrote the same route first would write it in every path.

Two kinds of trace, so that the share of responses with a block can change in training: *parallel* (a block) and
*plain* (one route, no block).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from parallel_r1.format import check
from parallel_r1.rewards.grading import robust

KINDS = {"parallel": 0.75, "plain": 0.25}


@dataclass(frozen=True)
class Trace:
    """One trace: its text and how it was made."""

    text: str
    kind: str


def step_by_step(a: int, b: int) -> str:
    """57 + 68: 57+60=117, 117+8=125."""
    tens, ones = b // 10 * 10, b % 10
    return f"{a}+{tens}={a + tens}, {a + tens}+{ones}={a + b}"


def by_place_value(a: int, b: int) -> str:
    """57 + 68: 50+60=110, 7+8=15, 110+15=125."""
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    return f"{a // 10 * 10}+{b // 10 * 10}={tens}, {a % 10}+{b % 10}={ones}, {tens}+{ones}={a + b}"


def write_trace(terms: tuple[int, int], rng: random.Random) -> Trace:
    """A checked trace for ``a + b``.

    Raises:
        AssertionError: the trace fails the format or the answer check; a bug in this file.
    """
    total = sum(terms)
    routes = [step_by_step(*terms), by_place_value(*terms)]
    rng.shuffle(routes)
    kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    block = (
        f"<Parallel><Path>{routes[0]}</Path><Path>{routes[1]}</Path></Parallel>\n"
        f"<Summary>Both give {total}.</Summary>\n"
    )
    work = f"Two ways.\n{block}" if kind == "parallel" else f"{routes[0]}.\n"
    text = f"{work}Final Answer: {total}"
    violations = check(text)
    verdict = robust(text, str(total))
    if violations or not verdict.correct or routes[0] == routes[1]:
        raise AssertionError(f"bad trace {text!r}: {violations or verdict}")
    return Trace(text, kind)

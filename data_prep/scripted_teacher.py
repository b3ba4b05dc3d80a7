"""A scripted teacher: parallel-thinking traces for sums of three numbers.

Each block holds two genuinely different routes, adding from the left and adding from the right. Their order is drawn at
random, because paths that are decoded concurrently all start from the same prefix: a model that always wrote the left
route first would write it in every path.

Two kinds of trace, so that the share of responses with a block can change in training: *parallel* (a block) and
*plain* (one route, no block).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from parallel_r1.format import check
from parallel_r1.rewards.grading import grade

KINDS = {"parallel": 0.75, "plain": 0.25}


@dataclass(frozen=True)
class Trace:
    """One trace: its text and how it was made."""

    text: str
    kind: str


def left_to_right(a: int, b: int, c: int) -> str:
    return f"{a}+{b}={a + b}, {a + b}+{c}={a + b + c}"


def right_to_left(a: int, b: int, c: int) -> str:
    return f"{b}+{c}={b + c}, {a}+{b + c}={a + b + c}"


def write_trace(terms: tuple[int, int, int], rng: random.Random) -> Trace:
    """A checked trace for ``a + b + c``.

    Raises:
        AssertionError: the trace fails the format or the answer check; a bug in this file.
    """
    total = sum(terms)
    routes = [left_to_right(*terms), right_to_left(*terms)]
    rng.shuffle(routes)
    kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    block = (
        f"<Parallel><Path>{routes[0]}</Path><Path>{routes[1]}</Path></Parallel>\n"
        f"<Summary>Both give {total}.</Summary>\n"
    )
    work = f"Try two ways.\n{block}" if kind == "parallel" else f"{routes[0]}.\n"
    text = f"{work}Final Answer: {total}"
    violations = check(text)
    verdict = grade(text.rpartition("</Summary>")[2], str(total))
    if violations or not verdict.correct or routes[0] == routes[1]:
        raise AssertionError(f"bad trace {text!r}: {violations or verdict}")
    return Trace(text, kind)

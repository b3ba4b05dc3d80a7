"""Response text -> valid format or the list of violations, by three rules.

The strict rule (ours): every block is ``<Parallel>`` + at least two non-empty ``<Path>…</Path>`` with nothing but white
space between them + ``</Parallel>`` + white space + one closed, non-empty ``<Summary>…</Summary>``; nothing nested, no
tag anywhere else. A response without a block is valid.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from parallel_r1.tags import (
    PARALLEL_CLOSE,
    PARALLEL_OPEN,
    PATH_CLOSE,
    PATH_OPEN,
    SUMMARY_CLOSE,
    SUMMARY_OPEN,
    TAGS,
)

_TAG = re.compile("|".join(map(re.escape, TAGS)))


@dataclass
class Parse:
    """What a scan of one response found.

    Attributes:
        violations: "kind at character N" in order; empty means valid.
        paths_per_block: number of closed paths of every block that was opened.
        trunk_after: text after the last well-formed block (the whole text where there is none), where an answer
            counts.
    """

    violations: list[str] = field(default_factory=list)
    paths_per_block: list[int] = field(default_factory=list)
    trunk_after: str = ""


# state -> {tag: next state}; a tag that is not listed breaks the format
_MOVES = {
    "trunk": {PARALLEL_OPEN: "block"},
    "block": {PATH_OPEN: "path", PARALLEL_CLOSE: "closed"},
    "path": {PATH_CLOSE: "block"},
    "closed": {SUMMARY_OPEN: "summary"},
    "summary": {SUMMARY_CLOSE: "trunk"},
}
_UNCLOSED = {
    "block": "unclosed <Parallel>",
    "path": "unclosed <Path>",
    "closed": "block without <Summary>",
    "summary": "unclosed <Summary>",
}


def parse(text: str) -> Parse:
    """Scan ``text`` once, left to right; total, linear in its length."""
    result = Parse()
    state, content_start, trunk_start = "trunk", 0, 0
    for match in _TAG.finditer(text):
        tag, at = match.group(), match.start()
        between = text[content_start:at]
        following = _MOVES[state].get(tag)
        if following is None:
            result.violations.append(f"unexpected {tag} in {state} at character {at}")
        elif state in ("block", "closed") and between.strip():
            result.violations.append(f"text before {tag} at character {content_start}")
        elif state in ("path", "summary") and not between.strip():
            result.violations.append(f"empty {state} at character {content_start}")
        if tag == PARALLEL_OPEN:
            result.paths_per_block.append(0)
        elif tag == PATH_CLOSE and state == "path":
            result.paths_per_block[-1] += 1
        elif tag == PARALLEL_CLOSE and state == "block" and result.paths_per_block[-1] < 2:
            result.violations.append(f"block with {result.paths_per_block[-1]} path(s) at character {at}")
        elif tag == SUMMARY_CLOSE and state == "summary":
            trunk_start = match.end()
        if following is not None:
            state = following
        content_start = match.end()
    if state != "trunk":
        result.violations.append(f"{_UNCLOSED[state]} at character {content_start}")
    else:
        result.trunk_after = text[trunk_start:]
    return result


def check(text: str, rule: str = "strict") -> list[str]:
    """Violations in ``text``, each with its position; empty means valid.

    Args:
        rule: "strict" (ours, above), "reference" (decides as the published code: every block is closed and holds as
            many ``<Path>`` as ``</Path>``, at least two; it overlooks summaries, empty and nested paths and text
            between paths) or "algorithm1" (the paper's: tags match as a stack that is empty at the end).

    Raises:
        ValueError: another rule.
    """
    if rule not in RULES:
        raise ValueError(f"unknown format rule {rule!r}; there are {', '.join(RULES)}")
    return RULES[rule](text)


def _reference(text: str) -> list[str]:
    tags = [(match.group(), match.start()) for match in _TAG.finditer(text)]
    violations: list[str] = []
    opened: int | None = None  # where the open block began
    paths = closers = 0
    for tag, at in tags:
        if tag == PARALLEL_OPEN:
            if opened is not None:
                violations.append(f"unclosed <Parallel> at character {opened}")
            opened, paths, closers = at, 0, 0
        elif tag == PARALLEL_CLOSE:
            if opened is None:
                violations.append(f"unexpected </Parallel> at character {at}")
            elif paths != closers or paths < 2:
                violations.append(f"block with {paths} <Path> and {closers} </Path> at character {opened}")
            opened = None
        elif tag == PATH_OPEN and opened is not None:
            paths += 1
        elif tag == PATH_CLOSE and opened is not None:
            closers += 1
    if opened is not None:
        violations.append(f"unclosed <Parallel> at character {opened}")
    return violations


def _algorithm1(text: str) -> list[str]:
    closes = {PARALLEL_CLOSE: PARALLEL_OPEN, PATH_CLOSE: PATH_OPEN, SUMMARY_CLOSE: SUMMARY_OPEN}
    stack: list[tuple[str, int]] = []
    for match in _TAG.finditer(text):
        tag, at = match.group(), match.start()
        if tag not in closes:
            stack.append((tag, at))
        elif not stack or stack.pop()[0] != closes[tag]:
            return [f"unexpected {tag} at character {at}"]
    return [f"unclosed {tag} at character {at}" for tag, at in stack]


RULES = {"strict": lambda text: parse(text).violations, "reference": _reference, "algorithm1": _algorithm1}

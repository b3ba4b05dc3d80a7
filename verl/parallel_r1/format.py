"""Response text -> valid format or the list of violations.

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


def check(text: str) -> list[str]:
    """Violations of the strict rule in ``text``, each with its position; empty means valid."""
    return parse(text).violations

"""Compare answers symbolically, one a line: the process that :mod:`parallel_r1.rewards.math_pool` may kill.

    python -m parallel_r1.rewards.math_worker MEMORY

Reads ``[answer, gold]`` and writes ``status``, both as a line of JSON, after a first line that says it is ready.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any


def parse(text: str) -> list[Any]:
    """What ``text`` can mean, as math-verify's expressions; empty if nothing."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig
    from math_verify import parse as parse_any

    return parse_any(f"${text}$", [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None)


@lru_cache(maxsize=4096)
def parse_gold(text: str) -> list[Any]:
    return parse(text)


def compare(answer: str, gold: str) -> str:
    """ "ok", "wrong", "unparseable" (the answer is no mathematics) or "error" (the gold answer is none)."""
    from math_verify import verify

    expected = parse_gold(gold)
    if not expected:
        return "error"
    found = parse(answer)
    if not found:
        return "unparseable"
    return "ok" if verify(expected, found, timeout_seconds=None) else "wrong"


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
    answers, statuses = sys.stdin, os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # what a library prints is no status
    compare("1", "1")  # imports, before the limit
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps("ready"), file=statuses, flush=True)
    for line in answers:
        try:
            status = compare(*json.loads(line))
        except Exception:  # whatever an answer does to SymPy is the answer's fault, and is counted
            status = "error"
        print(json.dumps(status), file=statuses, flush=True)


if __name__ == "__main__":
    main()

"""Responses graded a second: the reference grader, the robust one on numbers, and on answers that need mathematics.

python benchmarks/rewards.py [--responses 2000]
"""

from __future__ import annotations

import argparse
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

from parallel_r1.rewards import score
from parallel_r1.rewards.math_pool import shared

BLOCK = (
    "Try.\n<Parallel><Path>{a} and so on</Path><Path>the other way, {b}</Path></Parallel>\n<Summary>Both.</Summary>\n"
)
FILLER = "We look at the problem from here and from there, and find that it holds. " * 20


def responses(kind: str, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """``(response, gold answer)``: long responses with a block, half of them right; no two answers alike."""
    found = []
    for i in range(count):
        n, wrong = rng.randint(2, 10**6), i % 2
        if kind == "numbers":
            answer, gold = str(n + wrong), str(n)
        else:
            answer, gold = f"\\frac{{{n + wrong}\\sqrt{{8}}}}{{{i + 3}}}", f"\\frac{{{2 * n}\\sqrt{{2}}}}{{{i + 3}}}"
        found.append((FILLER + BLOCK.format(a=n, b=i) + f"Final Answer: {answer}", gold))
    return found


def rate(kind: str, grader: str, count: int) -> float:
    rows = responses(kind, count, random.Random(0))
    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as threads:
        start = time.perf_counter()
        results = list(
            threads.map(lambda row: score("accuracy_parallel_interv", row[0], row[1], 9, grader=grader), rows)
        )
        seconds = time.perf_counter() - start
    correct = sum(result.grade.correct for result in results)
    if grader == "robust" and correct != (count + 1) // 2:
        raise SystemExit(f"{kind}: {correct} of {count} correct, expected half; the numbers would mean nothing")
    return count / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=2000)
    args = parser.parse_args()
    score("accuracy", "Final Answer: 1", "1", grader="reference")  # imports
    shared().compare("1", "1")
    print(f"{len(os.sched_getaffinity(0))} cores, {args.responses} responses each; responses per second:")
    for kind, grader in (("numbers", "reference"), ("numbers", "robust"), ("mathematics", "robust")):
        print(f"{grader:>9}, {kind:<11} {rate(kind, grader, args.responses):8.0f}", flush=True)


if __name__ == "__main__":
    main()

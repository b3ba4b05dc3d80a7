"""Sums of two numbers from reasoning-gym: training and held-out problems, and cold-start traces for them.

    python data_prep/arithmetic.py --out runs/quickstart/data --train 2400 --heldout 768 --seed 1

Writes ``train.parquet`` and ``heldout.parquet`` (verl's schema), ``cold_start.parquet`` (columns ``prompt``,
``response``; a trace for every training problem) and ``manifest.json``. The two sets share no problem: a problem is
its unordered terms, so ``57 + 68`` and ``68 + 57`` count as one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import reasoning_gym

from scripted_teacher import write_trace

TASK = {
    "operators": ["+"],
    "allow_parentheses": False,
    "allow_negation": False,
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 2,
    "max_digits": 2,
}
CHUNK = 4096  # problems drawn at a time


def draw_problems(count: int, seed: int) -> list[dict]:
    """``count`` problems with distinct unordered terms, in the order in which they were drawn.

    Only terms from 11 to 99 that do not end in 0: the teacher's two routes take a number apart into tens and ones.

    Raises:
        ValueError: the task does not have that many distinct problems.
    """
    problems: dict[tuple[int, ...], dict] = {}
    drawn = 0
    while len(problems) < count:
        chunk = reasoning_gym.create_dataset("basic_arithmetic", **TASK, size=CHUNK, seed=seed * 1_000_003 + drawn)
        before = len(problems)
        for entry in chunk:
            terms = tuple(int(term) for term in entry["metadata"]["expression"].split(" + "))
            if all(term > 10 and term % 10 for term in terms):
                problems.setdefault(tuple(sorted(terms)), {**entry, "terms": terms})
        drawn += CHUNK
        if len(problems) - before < CHUNK // 100:
            raise ValueError(f"only {len(problems)} distinct problems of this task; {count} asked for. Ask for fewer.")
    return list(problems.values())[:count]


def to_row(entry: dict, split: str, index: int) -> dict:
    """One row of verl's RL schema."""
    return {
        "data_source": "reasoning_gym/basic_arithmetic",
        "prompt": [{"role": "user", "content": entry["question"]}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": entry["answer"]},
        "extra_info": {"split": split, "index": index},
    }


def check_disjoint(train: list[dict], heldout: list[dict]) -> None:
    """Raises ValueError when a problem is in both sets."""
    shared = {tuple(sorted(e["terms"])) for e in train} & {tuple(sorted(e["terms"])) for e in heldout}
    if shared:
        raise ValueError(f"{len(shared)} problems are in both sets, for example {sorted(shared)[0]}")


def build(out: Path, *, train: int, heldout: int, seed: int) -> dict:
    """Write the three files and the manifest; returns the manifest."""
    problems = draw_problems(train + heldout, seed)
    sets = {"heldout": problems[:heldout], "train": problems[heldout:]}
    check_disjoint(sets["train"], sets["heldout"])
    rng = random.Random(seed)
    traces = [write_trace(entry["terms"], rng) for entry in sets["train"]]

    out.mkdir(parents=True, exist_ok=True)
    frames = {
        name: pd.DataFrame([to_row(entry, name, i) for i, entry in enumerate(entries)])
        for name, entries in sets.items()
    }
    frames["cold_start"] = pd.DataFrame({"prompt": frames["train"]["prompt"], "response": [t.text for t in traces]})
    manifest = {
        "source": f"reasoning-gym {version('reasoning-gym')} basic_arithmetic",
        "task": TASK,
        "seed": seed,
        "rows": {name: len(frame) for name, frame in frames.items()},
        "traces": dict(Counter(trace.kind for trace in traces)),
        "sha256": {},
    }
    for name, frame in frames.items():
        path = out / f"{name}.parquet"
        frame.to_parquet(path.with_suffix(".tmp"), index=False)
        path.with_suffix(".tmp").replace(path)
        manifest["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--train", type=int, default=2400, help="training problems, each with a trace")
    parser.add_argument("--heldout", type=int, default=768, help="held-out problems")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    try:
        manifest = build(args.out, train=args.train, heldout=args.heldout, seed=args.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"arithmetic.py: {error}")
    print(json.dumps(manifest["rows"]))


if __name__ == "__main__":
    main()

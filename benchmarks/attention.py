"""Structured attention in training, forward and backward, at Qwen3-4B shapes: time and peak memory as ratios.

    python benchmarks/attention.py [--lengths 1024 8192] [--sequence-length 4096] [--out attention.json]

One row of N tokens: sequences with blocks of three paths that cover about two thirds of it. Three ways to attend:

- structured: what training runs (FlexAttention with a block mask on a GPU, one dense mask per sequence on a CPU);
- dense: scaled-dot-product attention with an additive N x N mask, what the published code trains with;
- causal: scaled-dot-product attention with is_causal, the cheapest there is, which ignores the structure.

Every measurement is a process of its own, so that peaks do not add up.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from parallel_r1.attention import PackedStructure, dense_mask, structured_attention
from parallel_r1.structure import annotate
from parallel_r1.tags import TagIds

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Qwen3-4B
TAGS = TagIds(1, 2, 3, 4, 5, 6)
WAYS = ("structured", "dense", "causal")


def sequence(length: int) -> np.ndarray:
    """Token ids: four blocks of three paths, a sixth of a quarter each, and trunk between."""
    quarter = length // 4
    path = [TAGS.path_open, *[0] * (quarter * 2 // 9 - 2), TAGS.path_close]
    block = [TAGS.parallel_open, *path * 3, TAGS.parallel_close]
    ids = ([0] * (quarter - len(block)) + block) * 4
    return np.array(ids + [0] * (length - len(ids)))


def measure(way: str, length: int, sequence_length: int, device: str, repeats: int) -> dict[str, float]:
    """Median seconds of one forward and backward pass, and peak bytes beyond the inputs."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lengths = [min(sequence_length, length - start) for start in range(0, length, sequence_length)]
    structures = [annotate(sequence(n), TAGS) for n in lengths]
    q, k, v = (
        torch.randn(1, heads, length, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    direction = torch.randn(1, length, HEADS, HEAD_DIM, device=device, dtype=dtype)
    module = torch.nn.Module()

    def run() -> None:
        if way == "structured":
            structure = PackedStructure(structures, device)
            out, _ = structured_attention(module, q, k, v, None, structure=structure)
        else:
            mask = None
            if way == "dense":
                allowed = torch.block_diag(*(dense_mask(structure) for structure in structures)).bool()
                mask = torch.zeros(length, length, dtype=dtype).masked_fill(~allowed, -torch.inf).to(device)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            ).transpose(1, 2)
        torch.autograd.grad(out, (q, k, v), direction)

    seconds = []
    base = _peak(device, reset=True)
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    warm = seconds[1:] if repeats else seconds  # the first run compiles
    return {"seconds": statistics.median(warm), "bytes": _peak(device) - base}


def _peak(device: str, reset: bool = False) -> int:
    if device == "cuda":
        if reset:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens in the row; default 1k to 4k, on a GPU to 32k")
    parser.add_argument("--sequence-length", type=int, help="tokens of each packed sequence; default: one sequence")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "LENGTH", "SEQUENCE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.one:
        way, length, sequence_length = args.one[0], int(args.one[1]), int(args.one[2])
        print(json.dumps(measure(way, length, sequence_length, device, args.repeats)))
        return
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    results = {"device": name, "torch": torch.__version__, "python": platform.python_version(), "rows": []}
    table = Table("tokens", *WAYS, "against dense", "against causal", title=f"forward and backward on {name}")
    for length in args.lengths or [2**n for n in range(10, 16 if device == "cuda" else 13)]:
        row: dict[str, object] = {"tokens": length}
        for way in WAYS:
            command = [sys.executable, __file__, "--repeats", str(args.repeats), "--one", way, str(length)]
            done = subprocess.run(
                [*command, str(args.sequence_length or length)], capture_output=True, text=True, check=False
            )
            failed = done.returncode != 0
            row[way] = {"error": done.stderr.strip()[-200:]} if failed else json.loads(done.stdout.splitlines()[-1])
        results["rows"].append(row)
        table.add_row(str(length), *(_cell(row[way]) for way in WAYS), *(_ratio(row, way) for way in WAYS[1:]))
    Console().print(table)
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")


def _cell(result: dict) -> str:
    if "error" in result:
        return "failed: " + result["error"].splitlines()[-1][:40]
    return f"{result['seconds'] * 1e3:.1f} ms, {result['bytes'] / 2**20:.0f} MiB"


def _ratio(row: dict, other: str) -> str:
    ours, theirs = row["structured"], row[other]
    if "error" in ours or "error" in theirs:
        return "-"
    return f"{ours['seconds'] / theirs['seconds']:.2f} time, {ours['bytes'] / max(theirs['bytes'], 1):.2f} memory"


if __name__ == "__main__":
    main()

"""Forked against sequential decoding of the same number of tokens, and the structured against the stock engine.

    python benchmarks/rollout.py [--model FOLDER] [--problems 1 4 16] [--repeats 5] [--out rollout.json]

Each problem: a prompt of 200 tokens, 16 of trunk, a block of four paths of 64, a summary of 16 and 32 more of trunk.
Sequential decodes the sum of it in one request. Both engines live in this process and take turns, so that their ratio
does not depend on what else the machine does. Runs on a CPU; the default model is a random Qwen3 of 25 million
parameters.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from parallel_r1 import environment

environment.prepare("cpu")

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

from parallel_r1.rollout import vllm_kwargs  # noqa: E402
from parallel_r1.tags import add_tags, tag_ids  # noqa: E402

PROMPT, TRUNK, PATHS, PATH, SUMMARY, AFTER = 200, 16, 4, 64, 16, 32
PHASES = ("trunk", "paths", "summary", "after")


def make_model(out: Path) -> Path:
    """A random Qwen3 with a small tokenizer and the six tags."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_prep"))
    from tiny_model import build_model, build_tokenizer

    tokenizer = build_tokenizer(["How many fruits are there? 3 apples and 4 pears make 7."])
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    model = build_model(tokenizer, 0, **sizes)
    add_tags(model, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


class Decoder:
    """One engine, and decoding of N problems with it."""

    def __init__(self, model: str, structured: bool):
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.tags = tag_ids(tokenizer)
        special = {*self.tags, *tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self.words = [i for i in range(len(tokenizer)) if i not in special]
        self.llm = LLM(
            model,
            dtype="float32",
            max_model_len=1024,
            enforce_eager=True,
            enable_prefix_caching=True,
            max_num_seqs=128,
            max_num_batched_tokens=8192,
            distributed_executor_backend="uni",
            disable_log_stats=True,
            **(vllm_kwargs(model) if structured else {}),
        )

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        sampling = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True, allowed_token_ids=self.words)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def sequential(self, prompts: list[list[int]]) -> dict[str, float]:
        start = time.perf_counter()
        self.generate(prompts, TRUNK + PATHS * PATH + SUMMARY + AFTER)
        return {"all": time.perf_counter() - start}

    def forked(self, prompts: list[list[int]]) -> dict[str, float]:
        times = [time.perf_counter()]
        rollouts = [p + out for p, out in zip(prompts, self.generate(prompts, TRUNK), strict=True)]
        times.append(time.perf_counter())
        opened = [ids + [self.tags.parallel_open] for ids in rollouts]
        paths = self.generate([ids + [self.tags.path_open] for ids in opened for _ in range(PATHS)], PATH)
        times.append(time.perf_counter())
        for i, ids in enumerate(opened):
            for path in paths[i * PATHS : (i + 1) * PATHS]:
                ids += [self.tags.path_open, *path, self.tags.path_close]
            ids += [self.tags.parallel_close, self.tags.summary_open]
        joined = [ids + out for ids, out in zip(opened, self.generate(opened, SUMMARY), strict=True)]
        times.append(time.perf_counter())
        self.generate([ids + [self.tags.summary_close] for ids in joined], AFTER)
        times.append(time.perf_counter())
        found = {phase: b - a for phase, a, b in zip(PHASES, times, times[1:], strict=False)}
        return found | {"all": times[-1] - times[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder with the six tags")
    parser.add_argument("--problems", type=int, nargs="+", default=[1, 4, 16], help="concurrent problems")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(make_model(Path(folder) / "model"))
        decoders = {"stock": Decoder(model, False), "structured": Decoder(model, True)}
    rng = random.Random(0)
    results = []
    table = Table("problems", "engine", "sequential", "forked", "speed-up", *PHASES, title="median seconds")
    ratios: dict[str, list[float]] = {"forked": [], "sequential": []}
    for count in args.problems:
        runs: dict[str, dict[str, list[dict[str, float]]]] = {
            name: {"sequential": [], "forked": []} for name in decoders
        }
        for repeat in range(args.repeats + 1):
            prompts = [[rng.choice(decoders["stock"].words) for _ in range(PROMPT)] for _ in range(count)]
            for way in ("sequential", "forked"):
                for name in sorted(decoders, reverse=bool(repeat % 2)):  # neither engine always goes first
                    times = getattr(decoders[name], way)(prompts)
                    if repeat:
                        runs[name][way].append(times)
        for name, ways in runs.items():
            median = {
                way: {key: statistics.median(times[key] for times in found) for key in found[0]}
                for way, found in ways.items()
            }
            speed_up = median["sequential"]["all"] / median["forked"]["all"]
            results.append({"problems": count, "engine": name, "speed_up": speed_up, **median})
            cells = [median["sequential"]["all"], median["forked"]["all"]]
            phases = [f"{median['forked'][phase]:.3f}" for phase in PHASES]
            table.add_row(str(count), name, *(f"{cell:.3f}" for cell in cells), f"{speed_up:.2f}x", *phases)
        for way, found in ratios.items():
            found += [
                ours["all"] / theirs["all"]
                for ours, theirs in zip(runs["structured"][way], runs["stock"][way], strict=True)
            ]
    overall = {way: statistics.median(found) for way, found in ratios.items()}
    Console(width=120).print(table)
    forked, sequential = overall["forked"], overall["sequential"]
    print(f"structured / stock, median over all runs: {forked:.3f} forked, {sequential:.3f} sequential")
    if args.out:
        args.out.write_text(json.dumps({"rows": results, "structured_over_stock": overall}, indent=2) + "\n")


if __name__ == "__main__":
    main()

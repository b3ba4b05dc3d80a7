"""Answer problems with a checkpoint, through the same fork/join decoding as training, and grade the answers.

    python -m parallel_r1.evaluation.generate quickstart_rl --model CHECKPOINT --problems heldout.parquet --out s.jsonl

Sampling settings, budgets and paths are those of the named training configuration. Every request has a seed of its own,
made from the run's seed, the problem and the place in the response.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from parallel_r1 import environment
from parallel_r1.config import STRUCTURE_KEY, ParallelConfig
from parallel_r1.report import replacing
from parallel_r1.rewards.reward import score
from parallel_r1.rewards.schedule import VALIDATION_RECIPE
from parallel_r1.rollout.fork_join import ForkJoin, Rollout, Sampled, Segment
from parallel_r1.structure import annotate
from parallel_r1.tags import tag_ids
from parallel_r1.training import fidelity
from parallel_r1.training.compose import ConfigError, compose

CONCURRENCY = 256  # problems in flight


def check_structure(model: Path, parallel: ParallelConfig) -> None:
    """A checkpoint says how it was trained; answering with another structure would measure another policy.

    Raises:
        ValueError: it was trained with another variant or with prompt tags parsed otherwise.
    """
    trained = json.loads((model / "config.json").read_text()).get(STRUCTURE_KEY)
    wanted = fidelity.structure_kind(parallel)
    if trained not in (None, wanted):
        raise ValueError(
            f"{model} was trained with {STRUCTURE_KEY}={trained}, but parallel_r1.variant={parallel.variant} "
            f"with fidelity={parallel.fidelity} means {wanted}; evaluate it with the settings of its training"
        )


def to_sample(
    rollout: Rollout, row: dict[str, Any], index: int, sample: int, tokenizer: PreTrainedTokenizerBase, grader: str
) -> dict[str, Any]:
    """One line of the samples file (see :mod:`parallel_r1.evaluation.metrics`)."""
    response = tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
    gold = row["reward_model"]["ground_truth"]
    result = score(VALIDATION_RECIPE, response, gold, grader=grader)
    return {
        "index": index,
        "sample": sample,
        "prompt": row["prompt"][-1]["content"],
        "response": response,
        "ground_truth": gold,
        "correct": result.grade.correct,
        "grade": result.grade.status,
        "has_block": result.has_block,
        "violations": result.violations,
        "paths_per_block": result.paths_per_block,
        "tokens": len(rollout.token_ids),
        "critical_tokens": annotate(rollout.token_ids, tag_ids(tokenizer)).critical_tokens,
        "truncated": rollout.truncated,
        "forced_closers": rollout.forced_closers,
        "requests": [asdict(span) for span in rollout.spans],
    }


async def generate_samples(
    model: Path, rows: Sequence[dict[str, Any]], config: DictConfig, *, seed: int, samples: int = 1
) -> list[dict[str, Any]]:
    """``samples`` graded responses of ``model`` to every row of ``rows`` (verl's schema), in order."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    parallel = fidelity.parallel_config(config)
    rollout_config = config.actor_rollout_ref.rollout
    grader = parallel.reward.grader or "robust"
    seeded = parallel.rollout.model_copy(update={"seed": seed})
    machine = ForkJoin.for_model(tokenizer, str(model), seeded, config.data.max_response_length)
    max_model_len = config.data.max_prompt_length + config.data.max_response_length
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model),
            dtype=rollout_config.dtype,
            max_model_len=max_model_len,
            max_num_seqs=rollout_config.max_num_seqs,
            # room for every prompt at once: a seeded request that is prefilled in parts crashes vLLM's CPU engine
            max_num_batched_tokens=rollout_config.max_num_seqs * max_model_len,
            enforce_eager=rollout_config.enforce_eager,
            generation_config="vllm",
            distributed_executor_backend="uni" if config.trainer.device == "cpu" else None,
            disable_log_stats=True,
            seed=seed,
            **fidelity.engine_options(parallel, str(model)),
        )
    )
    sampling = {"temperature": rollout_config.temperature, "top_p": rollout_config.top_p, "top_k": rollout_config.top_k}
    limit = asyncio.Semaphore(CONCURRENCY)

    async def answer(index: int, sample: int, row: dict[str, Any]) -> dict[str, Any]:
        async def generate(prefix: list[int], request: dict[str, Any], segment: Segment) -> Sampled:
            params = SamplingParams(**request, output_kind=RequestOutputKind.FINAL_ONLY)
            request_id = f"{index}-{sample}-{'-'.join(map(str, segment))}"
            async for output in engine.generate({"prompt_token_ids": prefix}, params, request_id):
                final = output
            token_ids = list(final.outputs[0].token_ids)
            return Sampled(token_ids, [0.0] * len(token_ids))

        async with limit:
            prompt = tokenizer.apply_chat_template(list(row["prompt"]), add_generation_prompt=True, tokenize=False)
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
            rollout = await machine.run(generate, prompt_ids, sampling, (index, sample))
            return await asyncio.to_thread(to_sample, rollout, row, index, sample, tokenizer, grader)

    try:
        return await asyncio.gather(
            *(answer(index, sample, row) for index, row in enumerate(rows) for sample in range(samples))
        )
    finally:
        engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "config", help="training configuration whose sampling settings to use, for example quickstart_rl"
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--problems", type=Path, required=True, help="parquet in verl's schema")
    parser.add_argument("--out", type=Path, required=True, help="samples file (JSON lines)")
    parser.add_argument("--samples", type=int, default=1, help="responses per problem")
    parser.add_argument("--limit", type=int, help="only the first problems")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, key=value")
    args = parser.parse_intermixed_args()  # overrides may follow options
    for path, what in ((args.model / "config.json", "model"), (args.problems, "problems file")):
        if not path.is_file():
            sys.exit(f"evaluate: no {what} at {path}; check the path")
    try:
        config = compose(args.config, args.overrides)
        check_structure(args.model, fidelity.parallel_config(config))
    except (ConfigError, ValueError) as error:
        sys.exit(f"evaluate: {error}")
    environment.prepare(config.trainer.device)
    rows = pd.read_parquet(args.problems).to_dict("records")[: args.limit]
    samples = asyncio.run(generate_samples(args.model, rows, config, seed=args.seed, samples=args.samples))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as path:
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    print(f"{sum(s['correct'] for s in samples)} of {len(samples)} correct")


if __name__ == "__main__":
    main()

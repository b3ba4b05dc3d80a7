"""Fork and join through a vLLM engine in this process, and compare every generated token with a dense forward.

    python engine_parity.py MODEL '{"engine": {...}, "break": null}' ...   -> a line of JSON per engine

``break``: null, "stock" (stock engine), "mask" (positions only) or "positions" (mask only). Half of the rollouts answer
a chat whose instruction uses the tags, the others continue plain text.
"""

from __future__ import annotations

import json
import os
import random
import sys
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from parallel_r1 import environment

environment.prepare("cpu")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # noqa: E402

from parallel_r1.attention import dense_mask  # noqa: E402
from parallel_r1.chat import chat_format  # noqa: E402
from parallel_r1.rollout import hidden_rows, vllm_kwargs  # noqa: E402
from parallel_r1.structure import annotate  # noqa: E402
from parallel_r1.tags import tag_ids  # noqa: E402


class Rollout:
    """Token ids so far, and the engine's log-probability of each generated one."""

    def __init__(self, prompt: list[int]):
        self.ids, self.log_probs = list(prompt), {}

    def insert(self, *ids: int) -> None:
        self.ids += ids

    def append(self, output) -> None:
        for token, log_probs in zip(output.token_ids, output.logprobs, strict=True):
            self.log_probs[len(self.ids)] = log_probs[token].logprob
            self.ids.append(token)


def check(model: str, options: dict) -> dict:
    broken = options.get("break")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tags, chat = tag_ids(tokenizer), chat_format(tokenizer)
    plain = [i for i in range(len(tokenizer)) if i not in tags and i not in tokenizer.all_special_ids]
    plain = [i for i in plain if i not in tokenizer.get_added_vocab().values()]
    kwargs = {} if broken == "stock" else vllm_kwargs(model)
    engine = {"block_size": 32, "max_model_len": 512, "enforce_eager": True, "distributed_executor_backend": "uni"}
    engine |= {"enable_prefix_caching": True, **options.get("engine", {})}
    llm = LLM(model, dtype="float32", seed=0, disable_log_stats=False, **engine, **kwargs)

    rng = random.Random(options.get("seed", 1))

    def words(n: int) -> list[int]:
        return [rng.choice(plain) for _ in range(n)]

    def generate(prompts: list[list[int]], lengths: list[int]):
        sampling = [
            SamplingParams(max_tokens=n, temperature=1.0, logprobs=0, ignore_eos=True, allowed_token_ids=plain)
            for n in lengths
        ]
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    explanation = "use <Parallel><Path>one</Path><Path>two</Path></Parallel><Summary>both</Summary>"
    messages = [{"role": "user", "content": explanation}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompts = [tokenizer.encode(text, add_special_tokens=False), words(40)]
    rollouts = [Rollout(prompts[i % 2] + words(rng.randint(1, 60))) for i in range(options.get("rollouts", 6))]
    for _ in range(2):
        for rollout, output in zip(rollouts, generate([r.ids for r in rollouts], [8] * len(rollouts)), strict=True):
            rollout.append(output)
            rollout.insert(tags.parallel_open)
        paths = [(r, rng.randint(3, options.get("longest", 30))) for r in rollouts for _ in range(rng.randint(3, 4))]
        outputs = generate([[*r.ids, tags.path_open] for r, _ in paths], [n for _, n in paths])
        for (rollout, _), output in zip(paths, outputs, strict=True):
            rollout.insert(tags.path_open)
            rollout.append(output)
            rollout.insert(tags.path_close)
        for rollout in rollouts:
            rollout.insert(tags.parallel_close, plain[0], tags.summary_open)
        for rollout, output in zip(rollouts, generate([r.ids for r in rollouts], [10] * len(rollouts)), strict=True):
            rollout.append(output)
            rollout.insert(tags.summary_close)
    for rollout, output in zip(rollouts, generate([r.ids for r in rollouts], [12] * len(rollouts)), strict=True):
        rollout.append(output)

    preemptions = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    worst, tokens = 0.0, 0
    for rollout in rollouts:
        structure = annotate(rollout.ids, tags, chat=chat)
        assert len(structure.blocks) == 2 and all(len(block.paths) >= 3 for block in structure.blocks)
        ids = torch.tensor(rollout.ids)
        with torch.no_grad():
            logits = reference(
                input_ids=ids[None],
                attention_mask=dense_mask(structure)[None, None],
                position_ids=torch.from_numpy(structure.position_ids)[None],
            ).logits[0]
        at = torch.tensor(list(rollout.log_probs))
        expected = logits.log_softmax(-1)[at - 1, ids[at]]
        worst = max(worst, (expected - torch.tensor(list(rollout.log_probs.values()))).abs().max().item())
        tokens += len(at)
    return {"worst": worst, "tokens": tokens, "preemptions": preemptions}


def broken_engine(kind: str | None) -> AbstractContextManager:
    """The engine without its mask, or without its positions."""
    if kind == "mask":
        return patch.object(hidden_rows, "find", lambda *_: None)
    if kind == "positions":
        from parallel_r1.rollout.vllm_model import Structured

        stock = Structured.get_mrope_input_positions

        def causal_positions(self, tokens, *_, **__):
            rows, _ = stock(self, tokens)
            rows[0] = torch.arange(len(tokens))
            return rows, 0

        return patch.object(Structured, "get_mrope_input_positions", causal_positions)
    return nullcontext()


def main() -> None:
    for argument in sys.argv[2:]:
        options = json.loads(argument)
        with broken_engine(options.get("break")):
            print(json.dumps(check(sys.argv[1], options)), flush=True)


if __name__ == "__main__":
    main()

"""Decode one response that forks at ``<Parallel>`` and joins again.

    trunk --<Parallel>--> paths (concurrent requests) --> join --> summary --</Summary>--> trunk --> end of text

Every segment is one engine request on the token ids so far; the engine's prefix cache makes the shared prefix cheap.
Tokens that the state machine writes (``<Path>``, ``</Parallel>``, the join text, ``<Summary>``, a closer that the model
did not write within its budget) carry mask 0: they were not sampled and must not be trained.

Departures from the published rollout: budgets are set before a request, not cut after it; any number of paths; after
the last allowed block the model goes on to its answer instead of stopping.
Source: Parallel-R1 (arXiv 2509.07980), section 3.2.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from parallel_r1.config import RolloutConfig
from parallel_r1.tags import TagIds, tag_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORBIDDEN = -100.0  # logit bias that the sampler cannot overcome


@dataclass(frozen=True)
class Sampled:
    """What one engine request returned: sampled ids (the stop token included) and their log-probabilities."""

    token_ids: list[int]
    log_probs: list[float]


class Segment(NamedTuple):
    """What one request decodes: "trunk", "path" or "summary", in or after which block, and which path of it."""

    kind: str
    block: int
    path: int = 0


Generate = Callable[[list[int], dict[str, Any], Segment], Awaitable[Sampled]]
"""``(token ids of the prefix, vLLM sampling parameters, segment) -> Sampled``."""


@dataclass(frozen=True)
class Span:
    """One request: what it decoded and when (seconds of ``time.monotonic``)."""

    segment: Segment
    start: float
    end: float


@dataclass
class Rollout:
    """One response.

    Attributes:
        token_ids: response ids, inserted tokens included.
        mask: 1 where the token was sampled, 0 where it was inserted.
        log_probs: engine log-probability of sampled tokens, 0.0 on inserted ones.
        spans: the requests, in the order in which they ended.
        truncated: the response ran out of tokens before its end-of-text token.
        forced_closers: ``</Path>`` and ``</Summary>`` written for the model because a budget ran out.
    """

    token_ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    truncated: bool = False
    forced_closers: int = 0

    def insert(self, *ids: int) -> None:
        self.token_ids += ids
        self.mask += [0] * len(ids)
        self.log_probs += [0.0] * len(ids)

    def append(self, sampled: Sampled) -> None:
        self.token_ids += sampled.token_ids
        self.mask += [1] * len(sampled.token_ids)
        self.log_probs += sampled.log_probs


class ForkJoin:
    """Fork/join decoding against any engine.

    Args:
        tags: ids of the six tags.
        config: paths, blocks and budgets.
        join_ids: ids of ``config.join_text``.
        end_ids: ids that end a response; forbidden inside paths and summaries.
        max_response_tokens: length limit of the whole response, inserted tokens included.
    """

    def __init__(
        self,
        tags: TagIds,
        config: RolloutConfig,
        *,
        join_ids: Sequence[int],
        end_ids: Sequence[int],
        max_response_tokens: int,
    ):
        self.tags = tags
        self.config = config
        self.join_ids = list(join_ids)
        self.end_ids = frozenset(end_ids)
        self.max_response_tokens = max_response_tokens
        self._join_cost = 1 + len(self.join_ids) + 1  # </Parallel>, join text, <Summary>
        self._inside = [tags.path_open, tags.parallel_open, tags.parallel_close, *self.end_ids]

    @classmethod
    def for_model(
        cls, tokenizer: PreTrainedTokenizerBase, model_path: str, config: RolloutConfig, max_response_tokens: int
    ) -> ForkJoin:
        """The state machine for a model: a response ends at the end-of-text ids of tokenizer and generation config."""
        ends = {tokenizer.eos_token_id}
        generation = Path(model_path) / "generation_config.json"
        if generation.is_file():
            eos = json.loads(generation.read_text()).get("eos_token_id")
            ends.update(eos if isinstance(eos, list) else [eos])
        return cls(
            tag_ids(tokenizer),
            config,
            join_ids=tokenizer.encode(config.join_text, add_special_tokens=False),
            end_ids=sorted(ends - {None}),
            max_response_tokens=max_response_tokens,
        )

    async def run(self, generate: Generate, prompt_ids: Sequence[int], sampling: dict[str, Any]) -> Rollout:
        """Decode one response to ``prompt_ids`` with ``sampling`` (temperature, top_p, ...) in every segment."""
        prompt, out, blocks = list(prompt_ids), Rollout(), 0
        while True:
            room = self.max_response_tokens - len(out.token_ids)
            if room < 1:
                out.truncated = True
                return out
            forbidden = [self.tags.path_open]
            if blocks >= self.config.max_blocks:
                forbidden.append(self.tags.parallel_open)
            request = self._request(sampling, room, stop=self.tags.parallel_open, forbid=forbidden)
            sampled = await self._decode(generate, prompt + out.token_ids, request, Segment("trunk", blocks), out)
            out.append(sampled)
            last = sampled.token_ids[-1] if sampled.token_ids else None
            if last != self.tags.parallel_open:
                out.truncated = last not in self.end_ids
                return out
            if not await self._block(generate, prompt, out, sampling, blocks):
                out.truncated = True
                return out
            blocks += 1

    async def _block(
        self, generate: Generate, prompt: list[int], out: Rollout, sampling: dict[str, Any], block: int
    ) -> bool:
        """Decode the paths of a block, join them and decode the summary. False: the response has no room for it."""
        paths = self.config.num_paths
        # each path: <Path>, at least one token, a closer; then the join, one summary token and its closer
        room = self.max_response_tokens - len(out.token_ids) - self._join_cost - 2
        budget = min(self.config.max_path_tokens, room // paths - 2)
        if budget < 1:
            return False
        prefix = [*prompt, *out.token_ids, self.tags.path_open]
        request = self._request(sampling, budget, stop=self.tags.path_close, forbid=self._inside)
        results = await asyncio.gather(
            *(self._decode(generate, prefix, request, Segment("path", block, path), out) for path in range(paths))
        )
        for sampled in results:
            out.insert(self.tags.path_open)
            self._append_closed(out, sampled, self.tags.path_close)
        out.insert(self.tags.parallel_close, *self.join_ids, self.tags.summary_open)

        budget = min(self.config.max_summary_tokens, self.max_response_tokens - len(out.token_ids) - 1)
        request = self._request(sampling, budget, stop=self.tags.summary_close, forbid=self._inside)
        sampled = await self._decode(generate, prompt + out.token_ids, request, Segment("summary", block), out)
        self._append_closed(out, sampled, self.tags.summary_close)
        return True

    @staticmethod
    async def _decode(
        generate: Generate, prefix: list[int], request: dict[str, Any], segment: Segment, out: Rollout
    ) -> Sampled:
        start = time.monotonic()
        sampled = await generate(list(prefix), dict(request), segment)
        out.spans.append(Span(segment, start, time.monotonic()))
        return sampled

    def _append_closed(self, out: Rollout, sampled: Sampled, closer: int) -> None:
        out.append(sampled)
        if not sampled.token_ids or sampled.token_ids[-1] != closer:
            out.insert(closer)
            out.forced_closers += 1

    def _request(self, sampling: dict[str, Any], budget: int, *, stop: int, forbid: list[int]) -> dict[str, Any]:
        return {
            **sampling,
            "max_tokens": budget,
            "stop_token_ids": [stop],
            "logit_bias": dict.fromkeys(forbid, FORBIDDEN),
        }

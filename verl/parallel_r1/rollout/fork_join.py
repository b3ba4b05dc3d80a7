"""Decode one response that forks at ``<Parallel>`` and joins again.

    trunk --<Parallel>--> paths (concurrent requests) --> join --> summary --</Summary>--> trunk --> end of text

Every segment is one engine request on the token ids so far; the engine's prefix cache makes the shared prefix cheap.
Tokens that the state machine writes (``<Path>``, ``</Parallel>``, the join text, ``<Summary>``, a closer that the model
did not write within its budget) carry mask 0: they were not sampled and must not be trained.

Departures from the published rollout: budgets are set before a request, not cut after it; any number of paths; a seed
per request; after the last allowed block the model goes on to its answer instead of stopping.
Source: Parallel-R1 (arXiv 2509.07980), section 3.2.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import warnings
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from parallel_r1.chat import ChatFormat, chat_format
from parallel_r1.config import RolloutConfig
from parallel_r1.structure import annotate
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


def seed_of(*place: Any) -> int:
    """Seed of one request: the same for the same place (run seed, step, sample, ..., segment), whatever runs beside."""
    return zlib.crc32(repr(place).encode())


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
        failed_paths: paths whose request failed twice; they are closed where they are, empty.
    """

    token_ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    truncated: bool = False
    forced_closers: int = 0
    failed_paths: int = 0

    @property
    def inserted(self) -> list[int]:
        """Indices of the tokens that were not sampled."""
        return [i for i, sampled in enumerate(self.mask) if not sampled]

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
        config: mode, paths, blocks and budgets.
        join_ids: ids of ``config.join_text``.
        end_ids: ids that end a response; forbidden inside paths and summaries.
        max_response_tokens: length limit of the whole response, inserted tokens included.
        chat: format of chats, to check that a prompt ends where the assistant speaks.
    """

    def __init__(
        self,
        tags: TagIds,
        config: RolloutConfig,
        *,
        join_ids: Sequence[int],
        end_ids: Sequence[int],
        max_response_tokens: int,
        chat: ChatFormat | None = None,
    ):
        self.tags = tags
        self.config = config
        self.join_ids = list(join_ids)
        self.end_ids = frozenset(end_ids)
        self.max_response_tokens = max_response_tokens
        self.chat = chat
        self.join_cost = 1 + len(self.join_ids) + 1  # </Parallel>, join text, <Summary>
        self.inside = [tags.path_open, tags.parallel_open, tags.parallel_close, *self.end_ids]

    @classmethod
    def for_model(
        cls, tokenizer: PreTrainedTokenizerBase, model_path: str, config: RolloutConfig, max_response_tokens: int
    ) -> ForkJoin:
        """The state machine for a model: a response ends with its turn, or at the end-of-text ids of the model."""
        chat = chat_format(tokenizer)
        ends = {tokenizer.eos_token_id, *(chat.end if chat else ())}
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
            chat=chat,
        )

    async def run(
        self, generate: Generate, prompt_ids: Sequence[int], sampling: dict[str, Any], place: tuple[Any, ...] = ()
    ) -> Rollout:
        """Decode one response to ``prompt_ids`` with ``sampling`` (temperature, top_p, ...) in every segment.

        Args:
            place: what tells this response from the others of the run (step, sample, ...), for seeds.

        Raises:
            ValueError: the prompt is a chat that does not end in an assistant turn, or inside an open block.
        """
        return await _Response(self, generate, list(prompt_ids), sampling, place).decode()

    def check_prompt(self, prompt: list[int]) -> None:
        """See :meth:`run`."""
        probe = [*prompt, self.tags.parallel_open, self.tags.path_open]
        blocks = annotate(probe, self.tags, chat=self.chat).blocks
        if not blocks or blocks[-1].start != len(prompt):
            raise ValueError(
                f"a block cannot open after this prompt of {len(prompt)} tokens: it does not end in an assistant turn "
                "(add_generation_prompt), or ends inside a block"
            )


class _Response:
    """The state of one response while it is decoded: trunk, fork, paths, join, summary, trunk, ..."""

    def __init__(
        self, machine: ForkJoin, generate: Generate, prompt: list[int], sampling: dict[str, Any], place: tuple[Any, ...]
    ):
        self.machine, self.generate, self.prompt = machine, generate, prompt
        self.sampling, self.place = sampling, place
        self.out = Rollout()

    async def decode(self) -> Rollout:
        machine, config, out = self.machine, self.machine.config, self.out
        if config.mode == "sequential":
            last = await self._trunk(0, [], [])
            out.truncated = last not in machine.end_ids
            return out
        machine.check_prompt(self.prompt)
        for block in range(config.max_blocks + 1):
            final = block == config.max_blocks
            if final and block and config.stop_after_blocks:
                break
            forbid = [machine.tags.path_open, *([machine.tags.parallel_open] if final else [])]
            last = await self._trunk(block, [machine.tags.parallel_open], forbid)
            if last != machine.tags.parallel_open:
                out.truncated = last not in machine.end_ids
                return out
            if not await self._block(block):
                break
        out.truncated = True
        return out

    def _room(self) -> int:
        """Tokens that the response may still have in sequence."""
        room = self.machine.max_response_tokens - len(self.out.token_ids)
        limit = self.machine.config.max_critical_tokens
        if limit is None:
            return room
        return min(room, limit - annotate(self.out.token_ids, self.machine.tags).critical_tokens)

    async def _trunk(self, block: int, stop: list[int], forbid: list[int]) -> int | None:
        """Decode trunk after ``block`` blocks; its last token, None if there is no room for one."""
        room = self._room()
        if room < 1:
            return None
        request = self._request(Segment("trunk", block), room, [*stop, *sorted(self.machine.end_ids)], forbid)
        sampled = await self._decode(self.prompt + self.out.token_ids, request, Segment("trunk", block))
        self.out.append(sampled)
        return sampled.token_ids[-1] if sampled.token_ids else None

    async def _block(self, block: int) -> bool:
        """Decode the paths of a block, join them and decode the summary. False: the response has no room for it."""
        machine, config, out = self.machine, self.machine.config, self.out
        paths = self._count_paths(block)
        # each path: <Path>, at least one token, a closer; then the join, one summary token and its closer
        after = machine.join_cost + 2
        together = machine.max_response_tokens - len(out.token_ids) - after
        if config.max_block_tokens is not None:
            together = min(together, config.max_block_tokens)
        budget = min(config.max_path_tokens, together // paths - 2, self._room() - after - 2)
        if budget < 1:
            return False
        prefix = [*self.prompt, *out.token_ids, machine.tags.path_open]
        results = await asyncio.gather(*(self._path(prefix, budget, block, path) for path in range(paths)))
        for sampled in results:
            out.insert(machine.tags.path_open)
            self._append_closed(sampled, machine.tags.path_close)
        out.insert(machine.tags.parallel_close, *machine.join_ids, machine.tags.summary_open)

        budget = min(config.max_summary_tokens, self._room() - 1)
        segment = Segment("summary", block)
        request = self._request(segment, budget, [machine.tags.summary_close], machine.inside)
        sampled = await self._decode(self.prompt + out.token_ids, request, segment)
        self._append_closed(sampled, machine.tags.summary_close)
        return True

    async def _path(self, prefix: list[int], budget: int, block: int, path: int) -> Sampled:
        """Decode one path; a request that fails is tried once more, then the path stays empty."""
        machine, config, segment = self.machine, self.machine.config, Segment("path", block, path)
        request = self._request(segment, budget, [machine.tags.path_close], machine.inside)
        for name, value in (("temperature", config.path_temperature), ("top_p", config.path_top_p)):
            if value is not None:
                request[name] = value[path % len(value)] if isinstance(value, list) else value
        for attempt in (1, 2):
            try:
                return await self._decode(prefix, request, segment)
            except Exception as error:
                warnings.warn(f"{segment} failed (attempt {attempt} of 2): {error!r}", RuntimeWarning, stacklevel=2)
        self.out.failed_paths += 1
        return Sampled([], [])

    def _count_paths(self, block: int) -> int:
        config = self.machine.config
        if isinstance(config.num_paths, int):
            return config.num_paths
        seeded = config.seed is not None
        rng = random.Random(seed_of(config.seed, *self.place, "paths", block)) if seeded else random
        return rng.randint(*config.num_paths)

    async def _decode(self, prefix: list[int], request: dict[str, Any], segment: Segment) -> Sampled:
        start = time.monotonic()
        sampled = await self.generate(list(prefix), dict(request), segment)
        self.out.spans.append(Span(segment, start, time.monotonic()))
        return sampled

    def _append_closed(self, sampled: Sampled, closer: int) -> None:
        self.out.append(sampled)
        if not sampled.token_ids or sampled.token_ids[-1] != closer:
            self.out.insert(closer)
            self.out.forced_closers += 1

    def _request(self, segment: Segment, budget: int, stop: list[int], forbid: list[int]) -> dict[str, Any]:
        request = {**self.sampling, "max_tokens": budget, "stop_token_ids": stop}
        if forbid:
            request["logit_bias"] = dict.fromkeys(forbid, FORBIDDEN)
        if self.machine.config.seed is not None:
            request["seed"] = seed_of(self.machine.config.seed, *self.place, *segment)
        return request

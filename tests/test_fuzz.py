"""Hostile token ids through everything that reads them: structure, masks, the rollout's assembly, the reward."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from parallel_r1.attention import dense_mask
from parallel_r1.chat import ChatFormat
from parallel_r1.config import RolloutConfig
from parallel_r1.rewards import score
from parallel_r1.rollout.fork_join import ForkJoin, Sampled, Segment
from parallel_r1.structure import annotate, regions
from parallel_r1.tags import TAGS, TagIds

IDS = TagIds(1000, 1001, 1002, 1003, 1004, 1005)
PO, PC, P, EP, S, ES = IDS
EOS, NEWLINE, IM, ASSISTANT = 1, 2, 3, 4
CHAT = ChatFormat(start=(IM,), header=(IM, ASSISTANT), end=(EOS,))
GOOD = [
    IM,
    ASSISTANT,
    NEWLINE,
    7,
    PO,
    P,
    8,
    9,
    EP,
    P,
    8,
    EP,
    PC,
    NEWLINE,
    S,
    5,
    ES,
    6,
    PO,
    P,
    7,
    EP,
    P,
    8,
    EP,
    PC,
    S,
    5,
]
GOOD += [ES, 9, EOS]
TEXT = {NEWLINE: "\n", EOS: "", 5: " 5", 6: "Final Answer:", 7: " 7", 8: "\\boxed{", 9: "9}", IM: "<", ASSISTANT: ">"}
TEXT |= dict(zip(IDS, TAGS, strict=True))
VOCABULARY = np.array([*TEXT, P, PO, PC])
COUNT = 100_000


def sequences(seed: int, count: int) -> Any:
    """Random ids, and well-formed ones with tokens changed, dropped, doubled, cut off or swapped."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        if i % 2:
            yield rng.choice(VOCABULARY, size=rng.integers(0, 40)).tolist()
            continue
        ids = list(GOOD)
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(0, len(ids)))
            kind = rng.integers(0, 5)
            if kind == 0:
                ids[at] = int(rng.choice(VOCABULARY))
            elif kind == 1:
                del ids[at]
            elif kind == 2:
                ids.insert(at, ids[at])
            elif kind == 3:
                ids = ids[: at + 1]
            else:
                other = int(rng.integers(0, len(ids)))
                ids[at], ids[other] = ids[other], ids[at]
            if not ids:
                break
        yield ids


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_thousand_sequences() -> None:
    blocks = valid = forked = 0

    class Engine:
        """Answers every request with the sequence at hand, whatever was asked for, cut at budget and stop tokens."""

        ids: list[int] = []

        async def __call__(self, prefix: list[int], request: dict[str, Any], segment: Segment) -> Sampled:
            shift = hash(segment) % (len(self.ids) + 1)
            out: list[int] = []
            for token in (self.ids[shift:] + self.ids[:shift])[: request["max_tokens"]]:
                if token not in request.get("logit_bias", ()):
                    out.append(token)
                if token in request["stop_token_ids"]:
                    break
            return Sampled(out, [-1.0] * len(out))

    engine = Engine()
    config = RolloutConfig(num_paths=[1, 3], max_blocks=2, max_path_tokens=9, max_summary_tokens=5, seed=1)
    limit = 70
    machine = ForkJoin(IDS, config, join_ids=[NEWLINE], end_ids=[EOS], max_response_tokens=limit, chat=CHAT)
    prompt = [IM, ASSISTANT, NEWLINE]

    async def fuzz() -> None:
        nonlocal blocks, valid, forked
        for i, ids in enumerate(sequences(0, COUNT)):
            chat = CHAT if i % 3 else None
            found = annotate(ids, IDS, start=i % 5 if chat is None else 0, chat=chat)
            blocks += len(found.blocks)
            assert len(found) == len(ids) and (found.position_ids >= 0).all()
            assert (found.hidden_start <= found.hidden_end).all()
            assert (found.hidden_end <= np.arange(len(ids))).all()  # no row hides itself
            if i % 20 == 0 and ids:
                assert dense_mask(found).diagonal().all()
            assert len(regions(ids, found, IDS)) == len(ids)

            engine.ids = ids
            out = await machine.run(engine, prompt, {}, (i,))
            assert len(out.token_ids) == len(out.mask) == len(out.log_probs) <= limit
            forked += len(annotate(out.token_ids, IDS).blocks)
            for response in (ids, out.token_ids):
                text = "".join(TEXT[token] for token in response)
                for recipe in ("accuracy", "emphase_parallel"):
                    result = score(recipe, text, "5", grader="reference" if i % 20 else "robust")
                    assert result.score in (-1.0, 1.0, 1.2)
                valid += not result.violations and result.has_block

    asyncio.run(fuzz())
    assert blocks > COUNT / 4 and valid > COUNT / 100 and forked > COUNT / 100  # the interesting cases were there

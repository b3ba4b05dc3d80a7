"""The fork/join state machine against a scripted engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from parallel_r1.chat import ChatFormat
from parallel_r1.config import RolloutConfig
from parallel_r1.format import check
from parallel_r1.rollout.fork_join import ForkJoin, Rollout, Sampled, Segment
from parallel_r1.structure import annotate
from parallel_r1.tags import TAGS, TagIds

IDS = TagIds(100, 101, 102, 103, 104, 105)
PO, PC, P, EP, S, ES = IDS
EOS, NEWLINE, PROMPT = 1, 2, [7, 8, 9]


class Engine:
    """Answers each segment from a script, honours budgets, stops and bans, and records what it was asked."""

    def __init__(self, script: dict[Segment, list[int]], delays: dict[Segment, float] | None = None):
        self.script, self.delays = script, delays or {}
        self.asked: dict[Segment, tuple[list[int], dict[str, Any]]] = {}
        self.running, self.most_running = 0, 0

    async def __call__(self, prefix: list[int], request: dict[str, Any], segment: Segment) -> Sampled:
        self.asked[segment] = (prefix, request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(self.delays.get(segment, 0.0))
        self.running -= 1
        out: list[int] = []
        for token in self.script[segment]:
            if len(out) == request["max_tokens"]:
                break
            if token in request.get("logit_bias", ()):
                continue
            out.append(token)
            if token in request["stop_token_ids"] or token == EOS:
                break
        return Sampled(out, [-float(token) for token in out])


def decode(engine: Engine, *, tokens: int = 200, **config: Any) -> Rollout:
    machine = ForkJoin(IDS, RolloutConfig(**config), join_ids=[NEWLINE], end_ids=[EOS], max_response_tokens=tokens)
    return asyncio.run(machine.run(engine, PROMPT, {"temperature": 1.0}))


def script(paths: int = 2) -> dict[Segment, list[int]]:
    return {
        Segment("trunk", 0): [10, PO],
        **{Segment("path", 0, k): [20 + k, 30 + k, EP] for k in range(paths)},
        Segment("summary", 0): [40, ES],
        Segment("trunk", 1): [50, EOS],
    }


JOINED = [10, PO, P, 20, 30, EP, P, 21, 31, EP, PC, NEWLINE, S, 40, ES, 50, EOS]


def test_segments_land_in_the_order_of_the_format() -> None:
    # the first path ends last: order in the response is by path, not by time
    engine = Engine(script(), {Segment("path", 0, 0): 0.05})
    out = decode(engine)
    assert out.token_ids == JOINED
    assert out.mask == [1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    assert out.log_probs == [-float(t) if m else 0.0 for t, m in zip(out.token_ids, out.mask, strict=True)]
    assert not out.truncated and out.forced_closers == 0
    words = {**dict(zip(IDS, TAGS, strict=True)), NEWLINE: "\n", EOS: ""}
    assert check("".join(words.get(t, f" {t}") for t in out.token_ids)) == []
    assert annotate(out.token_ids, IDS).blocks[0].paths == ((2, 6), (6, 10))


def test_every_request_continues_the_right_prefix() -> None:
    engine = Engine(script())
    decode(engine)
    trunk = [10, PO]
    assert engine.asked[Segment("trunk", 0)][0] == PROMPT
    for k in range(2):
        assert engine.asked[Segment("path", 0, k)][0] == PROMPT + trunk + [P]  # no sibling in sight
    assert engine.asked[Segment("summary", 0)][0] == PROMPT + JOINED[: JOINED.index(S) + 1]
    assert engine.asked[Segment("trunk", 1)][0] == PROMPT + JOINED[: JOINED.index(ES) + 1]


@pytest.mark.parametrize("paths", [1, 2, 5])
def test_paths_run_at_the_same_time(paths: int) -> None:
    engine = Engine(script(paths), {Segment("path", 0, k): 0.03 for k in range(paths)})
    out = decode(engine, num_paths=paths)
    assert engine.most_running == paths
    spans = [span for span in out.spans if span.segment.kind == "path"]
    assert len(spans) == paths and max(s.start for s in spans) < min(s.end for s in spans)


def test_tags_that_would_break_the_structure_are_forbidden() -> None:
    engine = Engine(script())
    decode(engine, max_blocks=1)
    banned = {segment: set(request["logit_bias"]) for segment, (_, request) in engine.asked.items()}
    assert banned[Segment("trunk", 0)] == {P}
    assert banned[Segment("path", 0, 0)] == banned[Segment("summary", 0)] == {P, PO, PC, EOS}
    assert banned[Segment("trunk", 1)] == {P, PO}  # the last allowed block is over; the answer can still come


def test_after_the_last_block_the_model_goes_on_to_its_answer() -> None:
    engine = Engine(script() | {Segment("trunk", 1): [50, PO, 51, EOS]})
    out = decode(engine, max_blocks=1)
    assert out.token_ids[-3:] == [50, 51, EOS] and not out.truncated


def test_a_path_without_closer_gets_one_that_is_not_trained() -> None:
    engine = Engine(script() | {Segment("path", 0, 0): [20] * 50, Segment("summary", 0): [40] * 50})
    out = decode(engine, max_path_tokens=3, max_summary_tokens=2)
    assert out.token_ids[2:7] == [P, 20, 20, 20, EP] and out.mask[2:7] == [0, 1, 1, 1, 0]
    at = out.token_ids.index(S)
    assert out.token_ids[at + 1 : at + 4] == [40, 40, ES] and out.mask[at + 1 : at + 4] == [1, 1, 0]
    assert out.forced_closers == 2


@pytest.mark.parametrize("tokens", range(1, 40))
def test_length_limit_holds_whatever_the_engine_writes(tokens: int) -> None:
    endless = {Segment("trunk", b): [10, PO] for b in range(9)} | {Segment("summary", b): [40] * 99 for b in range(9)}
    endless |= {Segment("path", b, k): [20] * 99 for b in range(9) for k in range(3)}
    out = decode(Engine(endless), tokens=tokens, num_paths=3, max_blocks=9)
    assert 0 < len(out.token_ids) <= tokens and out.truncated
    assert len(out.token_ids) == len(out.mask) == len(out.log_probs)
    for block in annotate(out.token_ids, IDS).blocks:
        assert block.end is not None or not block.paths  # no block is cut in the middle of its paths


def test_an_engine_error_is_not_swallowed() -> None:
    async def broken(*_: Any) -> Sampled:
        raise ConnectionError("engine is gone")

    machine = ForkJoin(IDS, RolloutConfig(), join_ids=[NEWLINE], end_ids=[EOS], max_response_tokens=50)
    with pytest.raises(ConnectionError, match="engine is gone"):
        asyncio.run(machine.run(broken, PROMPT, {}))


def test_a_failed_path_is_tried_once_more_then_closed_and_counted() -> None:
    class Flaky(Engine):
        failures: dict[Segment, int]

        async def __call__(self, prefix: list[int], request: dict[str, Any], segment: Segment) -> Sampled:
            if self.failures.get(segment, 0):
                self.failures[segment] -= 1
                raise ConnectionError("no answer")
            return await super().__call__(prefix, request, segment)

    engine = Flaky(script())
    engine.failures = {Segment("path", 0, 1): 1}
    with pytest.warns(RuntimeWarning, match="attempt 1 of 2.*no answer"):
        out = decode(engine)
    assert out.token_ids == JOINED and out.failed_paths == 0

    engine.failures = {Segment("path", 0, 1): 2}
    with pytest.warns(RuntimeWarning, match="attempt 2 of 2"):
        out = decode(engine)
    assert out.failed_paths == 1 and out.forced_closers == 1
    assert out.token_ids == [10, PO, P, 20, 30, EP, P, EP, PC, NEWLINE, S, 40, ES, 50, EOS]
    assert out.inserted == [2, 6, 7, 8, 9, 10]


def test_seeds_depend_on_the_place_and_on_nothing_else() -> None:
    def seeds(place: tuple[int, ...], **config: Any) -> dict[Segment, int | None]:
        engine = Engine(script())
        rollout = RolloutConfig(**config)
        machine = ForkJoin(IDS, rollout, join_ids=[NEWLINE], end_ids=[EOS], max_response_tokens=200)
        asyncio.run(machine.run(engine, PROMPT, {}, place))
        return {segment: request.get("seed") for segment, (_, request) in engine.asked.items()}

    one = seeds((3, 5), seed=1)
    assert one == seeds((3, 5), seed=1)
    assert len(set(one.values())) == len(one) == 5  # trunk, two paths, summary, trunk
    assert not set(one.values()) & set(seeds((3, 6), seed=1).values())
    assert not set(one.values()) & set(seeds((3, 5), seed=2).values())
    assert set(seeds((3, 5)).values()) == {None}


def test_the_number_of_paths_can_be_drawn_for_every_block() -> None:
    endless = {Segment("trunk", b): [10, PO] for b in range(31)} | {Segment("summary", b): [40, ES] for b in range(30)}
    endless |= {Segment("path", b, k): [20, EP] for b in range(30) for k in range(4)}

    def counts(seed: int | None) -> list[int]:
        out = decode(Engine(endless), tokens=900, num_paths=[2, 4], max_blocks=30, seed=seed)
        return [len(block.paths) for block in annotate(out.token_ids, IDS).blocks]

    first = counts(7)
    assert set(first) == {2, 3, 4} and first == counts(7) and first != counts(8)
    assert set(counts(None)) <= {2, 3, 4}


def test_temperature_and_top_p_per_path() -> None:
    engine = Engine(script(3))
    decode(engine, num_paths=3, path_temperature=[0.5, 1.5], path_top_p=0.9)
    asked = {segment: (r["temperature"], r.get("top_p")) for segment, (_, r) in engine.asked.items()}
    assert [asked[Segment("path", 0, k)] for k in range(3)] == [(0.5, 0.9), (1.5, 0.9), (0.5, 0.9)]
    assert asked[Segment("trunk", 0)] == asked[Segment("summary", 0)] == (1.0, None)


def test_budgets_per_block_and_on_the_critical_path() -> None:
    endless = {Segment("trunk", 0): [10, PO], Segment("trunk", 1): [50] * 99, Segment("summary", 0): [40, ES]}
    endless |= {Segment("path", 0, k): [20] * 99 for k in range(4)}
    engine = Engine(endless)
    decode(engine, tokens=400, num_paths=4, max_block_tokens=40)
    assert engine.asked[Segment("path", 0, 0)][1]["max_tokens"] == 40 // 4 - 2

    for limit in range(12, 60):
        engine = Engine(endless)
        out = decode(engine, tokens=400, num_paths=4, max_critical_tokens=limit)
        structure = annotate(out.token_ids, IDS)
        assert structure.critical_tokens <= limit and out.truncated
    assert len(out.token_ids) > 2 * limit  # all tokens may be far more
    assert structure.critical_tokens == limit  # and the budget is used


def test_sequential_mode_is_one_plain_request() -> None:
    written = [10, PO, P, 20, EP, P, 21, EP, PC, S, 40, ES, 50, EOS]
    engine = Engine({Segment("trunk", 0): written})
    out = decode(engine, mode="sequential")
    assert out.token_ids == written and out.mask == [1] * len(written) and not out.truncated
    (request,) = (request for _, request in engine.asked.values())
    assert request["stop_token_ids"] == [EOS] and "logit_bias" not in request
    assert decode(Engine({Segment("trunk", 0): [10] * 99}), mode="sequential", tokens=9).truncated


def test_paper_mode_stops_after_the_last_block() -> None:
    engine = Engine(script())
    out = decode(engine, max_blocks=1, stop_after_blocks=True)
    assert out.token_ids == JOINED[: JOINED.index(ES) + 1] and out.truncated
    assert Segment("trunk", 1) not in engine.asked
    assert decode(Engine({Segment("trunk", 0): [10, EOS]}), max_blocks=0, stop_after_blocks=True).token_ids == [10, EOS]


def test_a_prompt_after_which_no_block_can_open_is_refused() -> None:
    chat = ChatFormat(start=(90,), header=(90, 91), end=(92,))
    machine = ForkJoin(IDS, RolloutConfig(), join_ids=[NEWLINE], end_ids=[EOS, 92], max_response_tokens=50, chat=chat)
    engine = Engine(script())
    with pytest.raises(ValueError, match="does not end in an assistant turn"):
        asyncio.run(machine.run(engine, [90, 93, 7, 92], {}))
    with pytest.raises(ValueError, match="inside a block"):
        asyncio.run(machine.run(engine, [90, 91, PO, P, 5], {}))
    assert not engine.asked
    assert asyncio.run(machine.run(engine, [90, 93, PO, 7, 92, 90, 91, NEWLINE], {})).token_ids == JOINED

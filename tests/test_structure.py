"""Structure of token sequences: against a brute-force reading of the rules, and properties on random ids."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_r1.structure import annotate
from parallel_r1.tags import TagIds

TAGS = TagIds(1000, 1001, 1002, 1003, 1004, 1005)
PO, PC, P, EP, S, ES = TAGS
ids_strategy = st.lists(st.one_of(st.sampled_from([PO, PC, P, P, EP, S, ES]), st.integers(0, 9)), max_size=60)


def brute_force(ids: list[int], start: int = 0) -> tuple[list[int], list[tuple[int, int]]]:
    """The rules of the module's docstring, one token at a time."""
    position, hidden = [], []
    current, first_path, own_path, base, longest = -1, None, None, None, None
    inside = False
    for i, token in enumerate(ids):
        tag = token if i >= start else None
        if inside and tag == P:
            if first_path is None:
                first_path, base, longest = i, current + 1, current
            else:
                longest = max(longest, current)
                current = base - 1
            own_path = i
        elif inside and tag == PC:
            if first_path is not None:
                current = max(longest, current)
            inside, first_path, own_path = False, None, None
        elif not inside and tag == PO:
            inside = True
        current += 1
        position.append(current)
        hidden.append((0, 0) if first_path is None or own_path == first_path else (first_path, own_path))
    return position, hidden


@settings(max_examples=500, deadline=None)
@given(ids_strategy, st.integers(0, 20))
def test_equals_brute_force(ids: list[int], start: int) -> None:
    found = annotate(ids, TAGS, start)
    position, hidden = brute_force(ids, start)
    assert found.position_ids.tolist() == position
    assert list(zip(found.hidden_start.tolist(), found.hidden_end.tolist(), strict=True)) == hidden


@settings(max_examples=300, deadline=None)
@given(ids_strategy, st.integers(0, 60))
def test_annotation_of_a_prefix_is_a_prefix(ids: list[int], cut: int) -> None:
    whole, part = annotate(ids, TAGS), annotate(ids[:cut], TAGS)
    for name in ("position_ids", "hidden_start", "hidden_end"):
        assert np.array_equal(getattr(whole, name)[:cut], getattr(part, name))


def test_two_paths() -> None:
    #       0  1   2  3  4  5   6  7  8   9   10
    ids = [5, PO, P, 6, 7, EP, P, 8, EP, PC, 9]
    found = annotate(ids, TAGS)
    assert found.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 6, 7]
    assert found.hidden_start.tolist() == [0, 0, 0, 0, 0, 0, 2, 2, 2, 0, 0]
    assert found.hidden_end.tolist() == [0, 0, 0, 0, 0, 0, 6, 6, 6, 0, 0]
    assert found.blocks[0].start == 1 and found.blocks[0].paths == ((2, 6), (6, 9)) and found.blocks[0].end == 9
    assert found.critical_tokens == 8


def test_one_path_is_causal_and_the_prompt_is_ordinary_text() -> None:
    ids = [5, PO, P, 6, EP, PC, 9]
    assert annotate(ids, TAGS).position_ids.tolist() == list(range(7))
    prompt = [PO, P, 1, P, 2, PC]
    assert annotate(prompt + [3], TAGS, start=len(prompt)).position_ids.tolist() == list(range(7))
    assert annotate(prompt + [3], TAGS).position_ids.tolist() != list(range(7))


def test_open_block_and_empty_input() -> None:
    block = annotate([PO, P, 1, P, 2], TAGS).blocks[0]
    assert block.end is None and block.paths == ((1, 3), (3, 5))
    assert len(annotate([], TAGS)) == 0 and annotate([], TAGS).critical_tokens == 0

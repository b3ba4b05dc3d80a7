"""Structure of token sequences: against a brute-force reading of the rules, and properties on random ids."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_r1.attention import dense_mask
from parallel_r1.chat import ChatFormat
from parallel_r1.structure import REGIONS, annotate, regions
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


def test_golden_answers_of_the_published_code() -> None:
    folder = os.environ.get("PARALLEL_R1_DATA")
    if not folder:
        pytest.skip("PARALLEL_R1_DATA is not set: no folder with golden/structure.parquet")
    golden = pd.read_parquet(Path(folder) / "golden" / "structure.parquet")
    assert len(golden) == 100
    paths = 0
    for row in golden.itertuples():
        found = annotate(row.input_ids, TAGS)
        assert found.position_ids.tolist() == list(row.position_ids)
        mask = [[allowed == "1" for allowed in line] for line in row.mask_rows]
        assert dense_mask(found).tolist() == mask
        paths += sum(len(block.paths) for block in found.blocks)
    assert paths > 100  # the answers are about blocks, not about plain text


@settings(max_examples=300, deadline=None)
@given(ids_strategy)
def test_siblings_never_see_each_other_and_everything_else_is_causal(ids: list[int]) -> None:
    found = annotate(ids, TAGS)
    mask = dense_mask(found).numpy()
    expected = np.tril(np.ones((len(ids), len(ids)), dtype=bool))
    for block in found.blocks:
        for i, (a, b) in enumerate(block.paths):
            for c, d in block.paths[:i]:
                expected[a:b, c:d] = False
    assert np.array_equal(mask, expected)
    assert mask.diagonal().all() and (found.position_ids >= 0).all()


@given(st.lists(st.sampled_from([PO, PC, P, EP, S, ES, 1, 2]), max_size=30))
def test_one_path_per_block_is_causal(ids: list[int]) -> None:
    # drop every <Path> that would start a second path of its block
    kept, inside, seen = [], False, False
    for token in ids:
        if inside and token == P and seen:
            continue
        seen = (seen or token == P) if inside else False
        inside = token == PO or inside and token != PC
        kept.append(token)
    found = annotate(kept, TAGS)
    assert found.position_ids.tolist() == list(range(len(kept)))
    assert (found.hidden_start == found.hidden_end).all()


# ---- chats


IM, END, USER, ASSISTANT, NL = 50, 51, 60, 61, 62
CHAT = ChatFormat(start=(IM,), header=(IM, ASSISTANT), end=(END,))
chat_ids = st.lists(st.sampled_from([PO, PC, P, P, EP, S, ES, IM, ASSISTANT, USER, END, 1, 2, 3]), max_size=60)


def in_assistant_turn(ids: list[int]) -> list[bool]:
    """Per token, one at a time: does a tag count here?"""
    inside, flags = False, []
    for i, token in enumerate(ids):
        if inside and token == END:
            inside = False
        flags.append(inside)
        if not inside and i and ids[i - 1] == IM and token == ASSISTANT:
            inside = True
    return flags


@settings(max_examples=500, deadline=None)
@given(chat_ids)
def test_tags_count_in_assistant_turns_only(ids: list[int]) -> None:
    ids = [IM, *ids]
    found = annotate(ids, TAGS, chat=CHAT)
    # the same as plain text whose tags elsewhere are words, and whose open blocks are closed where a turn ends
    flags = in_assistant_turn(ids)
    plain, opened = [], False
    for i, (token, flag) in enumerate(zip(ids, flags, strict=True)):
        ended = token == END and not flag and i and flags[i - 1]
        plain.append(PC if ended and opened else token if flag or token not in TAGS else 9)
        opened = (opened or token == PO) and token != PC if flag else False
    expected = annotate(plain, TAGS)
    for name in ("position_ids", "hidden_start", "hidden_end"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()


@settings(max_examples=300, deadline=None)
@given(chat_ids, st.integers(0, 61))
def test_annotation_of_a_chat_never_changes_as_it_grows(ids: list[int], cut: int) -> None:
    ids = [IM, *ids]
    whole, part = annotate(ids, TAGS, chat=CHAT), annotate(ids[:cut], TAGS, chat=CHAT)
    for name in ("position_ids", "hidden_start", "hidden_end"):
        assert np.array_equal(getattr(whole, name)[:cut], getattr(part, name))


def test_an_instruction_that_explains_the_tags_is_ordinary_text() -> None:
    instruction = [IM, USER, NL, PO, P, 1, EP, P, 2, EP, PC, END, NL]
    answer = [IM, ASSISTANT, NL, PO, P, 3, EP, P, 4, EP, PC, 5, END]
    found = annotate(instruction + answer, TAGS, chat=CHAT)
    assert found.position_ids[: len(instruction)].tolist() == list(range(len(instruction)))
    assert [block.start for block in found.blocks] == [len(instruction) + 3]
    assert len(annotate(instruction + answer, TAGS).blocks) == 2  # control: without the chat format it is a block
    plain = answer[3:]
    assert annotate(plain, TAGS, chat=CHAT).blocks[0].start == 0  # not a chat: tags count everywhere


def test_regions() -> None:
    ids = [7, PO, P, 1, EP, P, 2, EP, PC, 8, S, 3, ES, 4, PO, P, 5, EP, PC, 6]
    found = regions(ids, annotate(ids, TAGS), TAGS)
    names = [REGIONS[i] for i in found]
    assert names == ["trunk"] * 2 + ["path"] * 6 + ["summary"] * 5 + ["after"] * 2 + ["path"] * 3 + ["after"] * 2
    assert regions([1, 2], annotate([1, 2], TAGS), TAGS).tolist() == [0, 0]
    assert regions([PO, P, 1], annotate([PO, P, 1], TAGS), TAGS).tolist() == [0, 1, 1]


# ---- chat templates

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "headers": (
        "<|bos|>{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
    ),
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_format_is_read_from_the_template(name: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from parallel_r1.chat import chat_format

    marks = ["<|im_start|>", "<|im_end|>", "<|bos|>", "<|start|>", "<|stop|>", "<|eot|>", "<|end|>"]
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    base.train_from_iterator(["user\nassistant\n"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|end|>")
    assert chat_format(tokenizer) is None  # no template: everything is plain text
    tokenizer.chat_template = TEMPLATES[name]
    found = chat_format(tokenizer)
    assert ChatFormat.from_json(found.to_json()) == found

    messages = [{"role": "user", "content": "explain <Parallel>"}, {"role": "assistant", "content": "XX"}]
    text = tokenizer.apply_chat_template([*messages, *messages], tokenize=False)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False))
    assert found.is_chat(ids) and not found.is_chat(ids[1:])
    turns = found.turns(ids)
    said = [tokenizer.decode(ids[a:b]).strip().removeprefix("<think>\n\n</think>").strip() for a, b in turns]
    assert said == ["XX", "XX"]
    # the prompt of a rollout ends in an assistant turn, with the same header
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    prompt_ids = np.array(tokenizer.encode(prompt, add_special_tokens=False))
    begin, end = found.turns(prompt_ids)[-1]
    assert end is None and tokenizer.decode(prompt_ids[begin:]).strip() == ""

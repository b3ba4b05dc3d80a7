"""Structured attention of packed batches against dense masks; a whole model, packed against one sequence at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForCausalLM

from models import sharp_model
from parallel_r1 import attention
from parallel_r1.attention import BLOCK, PackedStructure, dense_mask, structured_attention
from parallel_r1.config import ATTENTION
from parallel_r1.structure import Structure, annotate
from parallel_r1.tags import TagIds

TAGS = TagIds(1000, 1001, 1002, 1003, 1004, 1005)
PO, PC, P, EP, S, ES = TAGS
BOUND = 1e-5  # float32


def random_structures(seed: int, count: int = 4, longest: int = 300) -> list[Structure]:
    rng = np.random.default_rng(seed)
    weights = np.array([2, 1, 3, 3, 60])
    tokens = np.array([PO, PC, P, EP, 7])
    lengths = rng.integers(1, longest, size=count)
    return [annotate(rng.choice(tokens, size=n, p=weights / weights.sum()), TAGS) for n in lengths]


def packed_dense(structures: list[Structure]) -> torch.Tensor:
    """(N, N) bool: each sequence's dense mask on the diagonal."""
    return torch.block_diag(*(dense_mask(structure) for structure in structures)).bool()


def inputs(n: int, seed: int = 0, grad: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, n, 16, generator=generator).requires_grad_(grad) for heads in (4, 2, 2)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_packed_attention_and_its_gradient_equal_a_dense_mask(seed: int) -> None:
    structures = random_structures(seed, longest=90)
    packed, dense = PackedStructure(structures), packed_dense(structures)
    qkv = inputs(len(packed), seed)
    found, _ = structured_attention(torch.nn.Module(), *qkv, None, structure=packed)
    expected = F.scaled_dot_product_attention(*qkv, attn_mask=dense, enable_gqa=True).transpose(1, 2)
    direction = torch.randn_like(found)
    assert (found - expected).abs().max() < BOUND
    for ours, theirs in zip(
        torch.autograd.grad(found, qkv, direction), torch.autograd.grad(expected, qkv, direction), strict=True
    ):
        assert (ours - theirs).abs().max() < BOUND


@pytest.mark.parametrize("seed", range(8))
def test_block_mask_decides_every_pair_like_the_dense_mask(seed: int) -> None:
    structures = random_structures(seed, longest=400)
    packed, dense = PackedStructure(structures), packed_dense(structures)
    mask, n = packed.block_mask, len(packed)
    blocks = -(-n // BLOCK)
    kinds = {}
    for kind, counts, indices in (
        ("partial", mask.kv_num_blocks, mask.kv_indices),
        ("full", mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        kinds[kind] = torch.zeros(blocks, blocks, dtype=torch.bool)
        for row in range(blocks):
            kinds[kind][row, indices[0, 0, row, : counts[0, 0, row]].long()] = True
    index = torch.arange(blocks * BLOCK)
    element = mask.mask_mod(0, 0, index[:, None], index[None])

    def spread(kind: torch.Tensor) -> torch.Tensor:
        return kind.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)

    found = spread(kinds["full"]) | spread(kinds["partial"]) & element
    assert torch.equal(found[:n, :n], dense)
    assert not (kinds["full"] & kinds["partial"]).any()
    undecided = kinds["partial"].sum() / (blocks * (blocks + 1) / 2)
    assert blocks < 4 or undecided < 1  # some blocks are skipped or need no mask


def test_flex_attention_equals_the_dense_mask() -> None:
    structures = random_structures(3)
    packed = PackedStructure(structures)
    qkv = inputs(len(packed), grad=False)  # on a CPU torch has no backward for it; tests/test_gpu.py has
    found = flex_attention(*qkv, block_mask=packed.block_mask, enable_gqa=True)
    expected = F.scaled_dot_product_attention(*qkv, attn_mask=packed_dense(structures), enable_gqa=True)
    assert (found - expected).abs().max() < BOUND
    causal = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
    assert (found - causal).abs().max() > 1000 * BOUND  # control


def test_nothing_hidden_is_packed_causal_attention() -> None:
    structures = [annotate([1] * n, TAGS) for n in (5, 1, 40)]
    packed = PackedStructure(structures)
    assert not packed.has_hidden and packed.padded[2] is None
    qkv = inputs(len(packed))
    found, _ = structured_attention(torch.nn.Module(), *qkv, None, structure=packed)
    expected = F.scaled_dot_product_attention(*qkv, attn_mask=packed_dense(structures), enable_gqa=True)
    assert (found - expected.transpose(1, 2)).abs().max() < BOUND


def test_misuse_is_refused() -> None:
    packed = PackedStructure([annotate([1] * 7, TAGS)])
    with pytest.raises(ValueError, match="needs structure="):
        structured_attention(torch.nn.Module(), *inputs(7), None)
    with pytest.raises(ValueError, match="7 tokens"):
        structured_attention(torch.nn.Module(), *inputs(8), None, structure=packed)
    with pytest.raises(NotImplementedError, match="sliding_window"):
        structured_attention(torch.nn.Module(), *inputs(7), None, structure=packed, sliding_window=4)
    with pytest.raises(NotImplementedError, match="dropout"):
        structured_attention(torch.nn.Module(), *inputs(7), None, structure=packed, dropout=0.1)


# ---- a whole model


def sequences(tags: TagIds, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Three sequences with two blocks of three paths, of different lengths."""
    rng = np.random.default_rng(seed)

    def words(low: int, high: int) -> list[int]:
        return rng.integers(3, vocabulary - 6, size=rng.integers(low, high)).tolist()

    found = []
    for _ in range(3):
        ids = words(5, 20)
        for _ in range(2):
            ids += [tags.parallel_open]
            for _ in range(3):
                ids += [tags.path_open, *words(2, 15), tags.path_close]
            ids += [tags.parallel_close, *words(1, 3), tags.summary_open, *words(2, 9), tags.summary_close]
            ids += words(2, 9)
        found.append(ids)
    return found


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def sharp(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TagIds]:
    from transformers import AutoTokenizer

    from parallel_r1.tags import tag_ids

    path = sharp_model(tmp_path_factory.mktemp("sharp") / request.param, request.param)
    return path, tag_ids(AutoTokenizer.from_pretrained(path))


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_model_equals_one_sequence_at_a_time(sharp: tuple[Path, TagIds], checkpointing: bool) -> None:
    path, tags = sharp
    attention.register()
    packed_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=ATTENTION)
    plain_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    if checkpointing:
        packed_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packed_model.train(), plain_model.train()
    rows = sequences(tags, plain_model.config.vocab_size)
    structures = [annotate(row, tags) for row in rows]
    packed = PackedStructure(structures)
    flat = torch.tensor([token for row in rows for token in row])

    def packed_log_probs(structure: PackedStructure) -> torch.Tensor:
        logits = packed_model(
            flat[None], position_ids=structure.position_ids, structure=structure, use_cache=False
        ).logits[0]
        return logits.log_softmax(-1)

    found = packed_log_probs(packed)
    parts = []
    for row, structure in zip(rows, structures, strict=True):
        logits = plain_model(
            torch.tensor([row]),
            attention_mask=dense_mask(structure)[None, None],
            position_ids=torch.from_numpy(structure.position_ids)[None],
            use_cache=False,
        ).logits[0]
        parts.append(logits.log_softmax(-1))
    expected = torch.cat(parts)
    labels = flat.roll(-1)[:, None]
    found, expected = found.gather(1, labels)[:, 0], expected.gather(1, labels)[:, 0]
    assert (found - expected).abs().max() < BOUND

    ours, theirs = gradients(packed_model, found.mean()), gradients(plain_model, expected.mean())
    scale = max(gradient.abs().max() for gradient in theirs.values())
    assert all((ours[name] - theirs[name]).abs().max() < BOUND * max(1, scale) for name in theirs)

    # control: causal attention, the same positions
    causal = PackedStructure([annotate(row, tags, start=len(row)) for row in rows])
    with torch.no_grad():
        control = packed_log_probs(causal).gather(1, labels)[:, 0]
    assert (control - expected).abs().max() > 10_000 * BOUND

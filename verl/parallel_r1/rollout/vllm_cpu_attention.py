"""vLLM's CPU attention backend with hidden keys.

The stock kernel computes every row causally; the rows with hidden keys are then computed again, in one batch over all
requests of the step, by scaled-dot-product attention over the cached keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from parallel_r1.rollout.hidden_rows import HiddenRows, StructuredImpl

SCORES = 2**25  # query-key pairs per batch and head; bounds the memory of a step


class StructuredCPUAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[StructuredCPUAttentionImpl]:
        return StructuredCPUAttentionImpl


class StructuredCPUAttentionImpl(StructuredImpl, CPUAttentionBackendImpl):
    def attend_hidden(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, rows: HiddenRows, output: torch.Tensor
    ) -> None:
        blocks, heads, size, _ = kv_cache.shape
        caches = kv_cache.view(blocks, heads, 2 * size, self.head_size).chunk(2, dim=2)
        layouts = cache_layout(kv_cache.dtype, size, self.head_size, self.isa)
        for batch in _batches(metadata, rows, size):
            keys, values = (
                read_cache(cache, batch.blocks, layout) for cache, layout in zip(caches, layouts, strict=True)
            )
            found = F.scaled_dot_product_attention(
                query[batch.row].transpose(1, 2), keys, values, attn_mask=batch.mask, scale=self.scale, enable_gqa=True
            )
            output[batch.row[batch.valid]] = found.transpose(1, 2)[batch.valid]


@dataclass(frozen=True)
class Batch:
    """Rows of B requests, padded to Q rows and K keys.

    Attributes:
        row: (B, Q) query rows.
        valid: (B, Q) bool, False on padding.
        blocks: (B, K / block size) cache blocks.
        mask: (B, 1, Q, K) bool, True = may attend.
    """

    row: torch.Tensor
    valid: torch.Tensor
    blocks: torch.Tensor
    mask: torch.Tensor


def _batches(metadata: Any, rows: HiddenRows, block_size: int) -> list[Batch]:
    """The hidden rows by request; computed by the first layer of a step and kept for the others."""
    kept = getattr(metadata, "hidden_batches", None)
    if kept is None:
        kept = metadata.hidden_batches = list(make_batches(rows, metadata.block_table, block_size))
    return kept


def make_batches(rows: HiddenRows, block_table: torch.Tensor, block_size: int) -> list[Batch]:
    """Batches of at most :data:`SCORES` query-key pairs (or one request)."""
    requests, counts = torch.unique_consecutive(rows.request, return_counts=True)
    firsts = counts.cumsum(0) - counts
    widest, longest = int(counts.max()), int(rows.key.max()) + 1
    per_batch = max(1, SCORES // (widest * longest))
    batches = []
    for request, first, count in zip(
        requests.split(per_batch), firsts.split(per_batch), counts.split(per_batch), strict=True
    ):
        step = torch.arange(int(count.max()))
        valid = step < count[:, None]
        index = first[:, None] + torch.where(valid, step, 0)  # padding repeats a request's first row
        key = rows.key[index]
        blocks = -(-(int(key.max()) + 1) // block_size)
        keys = torch.arange(blocks * block_size)
        hidden = (keys >= rows.start[index][..., None]) & (keys < rows.end[index][..., None])
        mask = (keys <= key[..., None]) & ~hidden
        batches.append(Batch(rows.row[index], valid, block_table[request, :blocks].long(), mask[:, None]))
    return batches


def read_cache(cache: torch.Tensor, blocks: torch.Tensor, layout: torch.Tensor | None) -> torch.Tensor:
    """(num_blocks, heads, size, dim) in the kernel's layout -> (B, heads, blocks * size, dim) of the given blocks."""
    _, heads, size, dim = cache.shape
    batch, count = blocks.shape
    found = cache[blocks]  # (B, blocks, heads, size, dim)
    if layout is not None:
        found = found.flatten(3)[..., layout].view(batch, count, heads, size, dim)
    return found.transpose(1, 2).reshape(batch, heads, count * size, dim)


@lru_cache
def cache_layout(dtype: torch.dtype, size: int, dim: int, isa: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where keys and values of a block are in the cache: flat index of element (token, dim); None = as written.

    The layout depends on the instruction set, so it is found by writing a ramp through the stock operator.
    """
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    ramp = (torch.arange(size * dim) + 1).to(bits)
    tokens = ramp.view(dtype).view(size, 1, dim)
    caches = torch.zeros(1, 1, 2 * size, dim, dtype=dtype).chunk(2, dim=2)
    slots = torch.arange(size)
    ops.cpu_attn_reshape_and_cache(tokens, tokens, *caches, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")
    layouts = []
    for cache in caches:
        place = cache.contiguous().view(bits).flatten().long() - 1
        if not torch.equal(place.sort().values, torch.arange(size * dim)):
            raise RuntimeError(f"vLLM's CPU cache for {dtype}, {isa} does not hold one value per element")
        inverse = place.argsort()
        layouts.append(None if torch.equal(inverse, torch.arange(size * dim)) else inverse)
    return tuple(layouts)

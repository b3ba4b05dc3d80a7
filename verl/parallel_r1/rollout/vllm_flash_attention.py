"""vLLM's FlashAttention backend with hidden keys, for GPUs (vLLM 0.24, the version that verl 0.9.1 pins).

The stock kernel computes every row causally. Rows with hidden keys are then computed again in two more calls for all
paths of the step, merged by their log-sum-exp:

    keys before the block's first path: paged cache, not causal
    keys of the own path: gathered from the cache, causal

The imports of vLLM's GPU modules are inside :func:`backend`, so that the algebra can be tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from parallel_r1.rollout.hidden_rows import HiddenRows, StructuredImpl


@dataclass(frozen=True)
class Segments:
    """Hidden rows by path: S runs of rows of one request that hide the same keys.

    Attributes:
        row: (R,) int64 query rows.
        query_start: (S + 1,) int32.
        before: (S,) int32, keys before the first path.
        blocks: (S, max_blocks) block table rows.
        own_start: (S + 1,) int32, into the gathered keys of own paths.
        own_block, own_offset: (sum of own keys,) int64, where those are in the paged cache.
        longest: most rows, keys before, and own keys of a segment.
    """

    row: torch.Tensor
    query_start: torch.Tensor
    before: torch.Tensor
    blocks: torch.Tensor
    own_start: torch.Tensor
    own_block: torch.Tensor
    own_offset: torch.Tensor
    longest: tuple[int, int, int]


def make_segments(rows: HiddenRows, block_table: torch.Tensor, block_size: int) -> Segments:
    identity = torch.stack([rows.request, rows.start, rows.end])
    identity, counts = identity.unique_consecutive(dim=1, return_counts=True)
    request, start, end = identity
    own = rows.key[counts.cumsum(0) - 1] + 1 - end  # keys of the own path, up to the segment's last row
    own_start = torch.nn.functional.pad(own.cumsum(0), (1, 0))
    key = torch.arange(int(own_start[-1]), device=own.device) + (end - own_start[:-1]).repeat_interleave(own)
    return Segments(
        row=rows.row,
        query_start=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
        before=start.int(),
        blocks=block_table[request],
        own_start=own_start.int(),
        own_block=block_table[request.repeat_interleave(own), key // block_size].long(),
        own_offset=key % block_size,
        longest=tuple(torch.stack([counts.max(), start.max(), own.max()]).tolist()),
    )


def attend(
    varlen: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    merge: Callable[..., None],
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    segments: Segments,
    output: torch.Tensor,
    scale: float,
    **options: Any,
) -> None:
    """Overwrite the rows of ``segments`` in ``output`` (tokens, heads, head_dim).

    Args:
        varlen: FlashAttention's ``flash_attn_varlen_func``.
        merge: vLLM's ``merge_attn_states``.
        key_cache, value_cache: (blocks, block size, kv heads, head_dim), any strides.
    """
    rows, before, own = segments.longest
    shared = {
        "q": query[segments.row],
        "cu_seqlens_q": segments.query_start,
        "max_seqlen_q": rows,
        "softmax_scale": scale,
        "return_softmax_lse": True,
        **options,
    }
    prefix, prefix_lse = varlen(
        k=key_cache,
        v=value_cache,
        seqused_k=segments.before,
        max_seqlen_k=before,
        block_table=segments.blocks,
        causal=False,
        **shared,
    )
    path, path_lse = varlen(
        k=key_cache[segments.own_block, segments.own_offset],
        v=value_cache[segments.own_block, segments.own_offset],
        cu_seqlens_k=segments.own_start,
        max_seqlen_k=own,
        causal=True,
        **shared,
    )
    merged = torch.empty_like(prefix)
    merge(merged, prefix, prefix_lse, path, path_lse)
    output[segments.row] = merged


def backend() -> type:
    """The backend class; built on first use, as its base imports GPU kernels."""
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    class StructuredFlashAttentionImpl(StructuredImpl, flash_attn.FlashAttentionImpl):
        def attend_hidden(
            self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, rows: HiddenRows, output: torch.Tensor
        ) -> None:
            keys, values = kv_cache.unbind(1)
            segments = getattr(metadata, "hidden_segments", None)
            if segments is None:  # the first layer of a step; the others use the same
                segments = metadata.hidden_segments = make_segments(rows, metadata.block_table, keys.shape[1])
            attend(
                flash_attn.flash_attn_varlen_func,
                merge_attn_states,
                query,
                keys,
                values,
                segments,
                output,
                self.scale,
                fa_version=self.vllm_flash_attn_version,
            )

    class StructuredFlashAttentionBackend(flash_attn.FlashAttentionBackend):
        @staticmethod
        def get_impl_cls() -> type:
            return StructuredFlashAttentionImpl

    return StructuredFlashAttentionBackend


def __getattr__(name: str) -> Any:
    if name == "StructuredFlashAttentionBackend":
        globals()[name] = found = backend()
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

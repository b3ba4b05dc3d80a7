"""Structure -> attention: a dense mask, or a packed batch whose attention never builds an n x n mask on a GPU.

:func:`structured_attention` is an attention implementation for Hugging Face models, registered under the name
:data:`ATTENTION`. It takes several sequences packed into one row of N tokens and their :class:`PackedStructure`:

- on a GPU, FlexAttention with a block mask derived from the hidden ranges: memory O((N / 128)^2) for the block lists;
- on a CPU, scaled-dot-product attention with a dense mask per sequence: O(batch * longest^2), not O(N^2).

With nothing hidden it is plain causal attention on packed sequences, which is what the Seen variant trains with.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

from parallel_r1.config import ATTENTION
from parallel_r1.structure import Structure

BLOCK = 128  # tokens; FlexAttention's block size


def dense_mask(structure: Structure) -> torch.Tensor:
    """(n, n) bool, True = query (row) may attend to key (column)."""
    return _allowed(
        torch.arange(len(structure)),
        torch.arange(len(structure)),
        torch.from_numpy(structure.hidden_start),
        torch.from_numpy(structure.hidden_end),
    )


def _allowed(query: torch.Tensor, key: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """(..., q, k) bool from query indices with their hidden ranges (..., q), and key indices (k,)."""
    key = key.view(*(1,) * query.ndim, -1)
    hidden = (key >= start[..., None]) & (key < end[..., None])
    return (key <= query[..., None]) & ~hidden


class PackedStructure:
    """Structure of B sequences packed into one row of N tokens, on one device.

    Attributes:
        lengths: (B,) int64.
        position_ids: (1, N) int64, starting anew in every sequence.
        document: (N,) int64, index of the sequence.
        hidden_start, hidden_end: (N,) int64, indices into the packed row; equal where nothing is hidden.
    """

    def __init__(self, structures: Sequence[Structure], device: torch.device | str = "cpu"):
        lengths = np.array([len(structure) for structure in structures], dtype=np.int64)
        offset = np.repeat(np.cumsum(lengths) - lengths, lengths)

        def pack(name: str) -> np.ndarray:
            return np.concatenate([getattr(structure, name) for structure in structures])

        columns = np.stack(
            [
                pack("position_ids"),
                np.repeat(np.arange(len(lengths)), lengths),
                pack("hidden_start") + offset,
                pack("hidden_end") + offset,
            ]
        )
        self.has_hidden = bool((columns[2] != columns[3]).any())
        on_device = torch.from_numpy(columns).to(device)
        self.position_ids = on_device[:1]
        self.document, self.hidden_start, self.hidden_end = on_device[1], on_device[2], on_device[3]
        self.lengths = torch.from_numpy(lengths).to(device)

    def __len__(self) -> int:
        return len(self.document)

    @cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's mask of the packed row, from per-block bounds; nothing of size N x N is built.

        A block pair that bounds cannot decide is marked partial, and ``mask_mod`` decides per element.
        """
        n, device = len(self), self.document.device
        blocks = -(-n // BLOCK)
        padding = blocks * BLOCK - n
        document = F.pad(self.document, (0, padding), value=-1)
        start, end = F.pad(self.hidden_start, (0, padding)), F.pad(self.hidden_end, (0, padding))

        def mask_mod(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (k <= q) & (document[q] == document[k]) & ~((k >= start[q]) & (k < end[q]))

        def bounds(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return values.view(blocks, BLOCK).amin(1), values.view(blocks, BLOCK).amax(1)

        low = torch.arange(blocks, device=device) * BLOCK
        high = low + BLOCK - 1
        first, last = bounds(F.pad(self.document, (0, padding), value=int(self.document[-1]) + 1))
        hides = start < end
        starts, ends = bounds(start.masked_fill(~hides, n))[0], bounds(end.masked_fill(~hides, 0))[1]
        all_start, all_end = bounds(start)[1], bounds(end)[0]  # what every row of a block hides lies in between

        q, k = (slice(None), None), (None, slice(None))
        possible = (low[k] <= high[q]) & (last[k] >= first[q])
        possible &= ~((all_start[q] <= low[k]) & (all_end[q] > high[k]))
        full = possible & (high[k] <= low[q]) & (first[k] == last[q])
        full &= (ends[q] <= low[k]) | (starts[q] > high[k])
        lists = [argument for kind in (possible & ~full, full) for argument in _block_list(kind)]
        return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(n, n))

    @cached_property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """For dense attention per sequence: token index (B, L), which of it are tokens (B, L), mask (B, 1, L, L).

        The mask is None where plain causal attention is meant.
        """
        starts = self.lengths.cumsum(0) - self.lengths
        steps = torch.arange(int(self.lengths.max()), device=self.lengths.device)
        valid = steps < self.lengths[:, None]
        index = (starts[:, None] + steps).clamp(max=len(self) - 1)
        if not self.has_hidden:
            return index, valid, None
        # rows beyond a sequence's end hide nothing: they are dropped, and no row may be without a key
        start, end = ((hidden[index] - starts[:, None]) * valid for hidden in (self.hidden_start, self.hidden_end))
        return index, valid, _allowed(steps.expand_as(index), steps, start, end)[:, None]


def _block_list(kind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, blocks) bool -> how many per row (1, 1, blocks), and which, first ones first (1, 1, blocks, blocks)."""
    order = kind.int().argsort(dim=1, descending=True, stable=True)
    return kind.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]


def structured_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    structure: PackedStructure | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed row; a Hugging Face attention function.

    Args:
        query: (1, heads, N, head_dim).
        key, value: (1, kv_heads, N, head_dim).
        structure: of the N tokens; the model's forward passes it on as a keyword argument.

    Returns:
        (1, N, heads, head_dim) and None for the weights.

    Raises:
        ValueError: no structure was passed, or it is of another length.
        NotImplementedError: dropout, a sliding window or attention sinks.
    """
    if structure is None or len(structure) != query.shape[2] or query.shape[0] != 1:
        found = "none" if structure is None else f"one of {len(structure)} tokens"
        raise ValueError(
            f"attn_implementation={ATTENTION!r} needs structure= with the structure of the packed row "
            f"{tuple(query.shape)}, found {found}; this model's forward may not pass keyword arguments on"
        )
    unsupported = {"dropout": dropout, "sliding_window": kwargs.get("sliding_window"), "s_aux": kwargs.get("s_aux")}
    used = [name for name, option in unsupported.items() if option is not None and option != 0.0]
    if used:
        raise NotImplementedError(f"structured attention does not support {', '.join(used)}; use a model without")
    if query.device.type != "cpu":
        from transformers.integrations.flex_attention import flex_attention_forward

        output, _ = flex_attention_forward(module, query, key, value, structure.block_mask, scaling=scaling)
        return output, None
    index, valid, mask = structure.padded
    batch = [query, key, value]
    if len(index) > 1:
        batch = [x[0].transpose(0, 1)[index].transpose(1, 2) for x in batch]
    output = F.scaled_dot_product_attention(
        *batch, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    ).transpose(1, 2)
    return (output[valid][None] if len(index) > 1 else output), None


def register() -> None:
    """Make :data:`ATTENTION` an ``attn_implementation`` of transformers; again is harmless."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, structured_attention)

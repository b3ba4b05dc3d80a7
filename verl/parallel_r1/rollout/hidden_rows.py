"""Which query rows of an engine step have hidden keys, in the form the attention backends need.

Computed once per step from the position rows and shared by all layers; no Python loop over tokens, requests or paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from parallel_r1.rollout.engine_kwargs import CONFIG_KEY

ATTRIBUTE = "hidden_rows"  # of a step's attention metadata: HiddenRows, or None if nothing is hidden


@dataclass(frozen=True)
class HiddenRows:
    """The R query rows of a step whose tokens have hidden keys, in order.

    Attributes (int64, on the engine's device):
        row: (R,) index into the step's query rows.
        request: (R,) index of the row's request.
        key: (R,) index of the row's own key in its request; keys up to it are causal.
        start, end: (R,) hidden keys ``[start, end)``.
    """

    row: torch.Tensor
    request: torch.Tensor
    key: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor


def find(hidden: torch.Tensor, query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> HiddenRows | None:
    """None if no row has hidden keys.

    Args:
        hidden: (2, tokens) hidden_start and hidden_end of every query row of the step.
        query_start_loc: (requests + 1,) first query row of each request.
        seq_lens: (requests,) keys of each request, this step's included.
    """
    row = torch.nonzero(hidden[0] != hidden[1])[:, 0]
    if not len(row):
        return None
    ends = query_start_loc[1:].long()
    request = torch.searchsorted(ends, row, right=True)
    key = seq_lens.long()[request] - (ends[request] - row)
    return HiddenRows(row, request, key, hidden[0, row].long(), hidden[1, row].long())


class StructuredImpl:
    """Mix-in before an attention implementation of vLLM: stock attention, then the rows with hidden keys again.

    For a stock model it changes nothing; a subclass has ``attend_hidden``.

    Raises:
        ValueError: on construction, a structured model with an attention feature that ``attend_hidden`` leaves out.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        from vllm.config import get_current_vllm_config

        super().__init__(*args, **kwargs)
        self.structured = hasattr(get_current_vllm_config().model_config.hf_config, CONFIG_KEY)
        refused = {
            "a sliding window": self.sliding_window not in (-1, (-1, -1)),
            "ALiBi": self.alibi_slopes is not None,
            "attention sinks": self.sinks is not None,
            "soft capping": bool(self.logits_soft_cap),
        }
        if self.structured and any(refused.values()):
            found = ", ".join(name for name, used in refused.items() if used)
            raise ValueError(f"structured attention does not support {found}")

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        result = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if self.structured and attn_metadata is not None:
            rows: HiddenRows | None = getattr(attn_metadata, ATTRIBUTE)  # missing: the mask was skipped, so fail
            if rows is not None:
                query, output = (x.view(-1, self.num_heads, self.head_size) for x in (query, output))
                self.attend_hidden(query, kv_cache, attn_metadata, rows, output)
        return result

    def attend_hidden(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, rows: HiddenRows, output: torch.Tensor
    ) -> None:
        """Overwrite ``rows`` of ``output``; query and output are (tokens, heads, head_dim)."""
        raise NotImplementedError


def publish(hidden: torch.Tensor, metadata: Any) -> None:
    """Attach the hidden rows of a step to its attention metadata, where the backend of every layer finds them.

    Args:
        hidden: (2, at least the step's tokens).
        metadata: of vLLM's forward context: by layer name, or None in a profiling run.

    Raises:
        TypeError: metadata of a kind that this plug-in does not know, under which the mask would be skipped.
    """
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise TypeError(f"attention metadata is a {type(metadata).__name__}; structured attention needs it by layer")
    for step in {id(value): value for value in metadata.values()}.values():
        rows = find(hidden[:, : step.num_actual_tokens], step.query_start_loc, step.seq_lens)
        setattr(step, ATTRIBUTE, rows)

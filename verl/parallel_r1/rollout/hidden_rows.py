"""Which query rows of an engine step have hidden keys, in the form the attention backends need.

Computed once per step from the position rows and shared by all layers; no Python loop over tokens, requests or paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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

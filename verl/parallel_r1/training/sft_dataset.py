"""Cold-start traces for verl's SFT trainer (``data.custom_cls``)."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from parallel_r1.format import check
from parallel_r1.tags import TagIds, tag_ids


def loss_mask(response_ids: np.ndarray, tags: TagIds, join_tokens: int) -> np.ndarray:
    """(n,) int64: 0 on the tokens that the rollout inserts, 1 on those that the model samples.

    Inserted are every ``<Path>``, and from ``</Parallel>`` through ``<Summary>`` (at most ``join_tokens`` apart).
    """
    mask = np.ones(len(response_ids), dtype=np.int64)
    mask[response_ids == tags.path_open] = 0
    for close in np.flatnonzero(response_ids == tags.parallel_close):
        following = response_ids[close : close + join_tokens + 2]
        opened = np.flatnonzero(following == tags.summary_open)
        mask[close : close + (opened[0] + 1 if len(opened) else 1)] = 0
    return mask


class TraceDataset(Dataset):
    """Rows ``prompt`` (chat messages) and ``response`` (text) -> ``input_ids``, ``position_ids``, ``loss_mask``.

    The engine derives mask and positions from the token ids (``parallel_r1.structure``) and packs the rows of a micro
    batch. The loss is on the response, without the tokens that a rollout inserts (unless ``data.train_inserted``).
    Rows longer than ``data.max_length`` tokens, and responses that violate the format, are counted and left out, never
    cut: half a block would teach the model to write half a block.

    Attributes:
        dropped: how many rows were left out, by reason.

    Raises:
        ValueError: a file lacks a column, or no row is left.
    """

    def __init__(
        self,
        parquet_files: str | Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        config: DictConfig,
        processor: Any = None,
        max_samples: int = -1,
    ):
        files = [parquet_files] if isinstance(parquet_files, str | Path) else list(parquet_files)
        frame = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
        missing = {"prompt", "response"} - set(frame.columns)
        if missing:
            raise ValueError(f"{files}: no column {sorted(missing)}; there are {list(frame.columns)}")
        if max_samples > 0:
            frame = frame.head(max_samples)
        tags = tag_ids(tokenizer)
        join_tokens = len(tokenizer.encode("\n", add_special_tokens=False))
        prompts = tokenizer.apply_chat_template(
            [list(prompt) for prompt in frame["prompt"]], add_generation_prompt=True, tokenize=False
        )
        prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        responses = tokenizer(list(frame["response"]), add_special_tokens=False)["input_ids"]
        self.rows: list[dict[str, torch.Tensor]] = []
        self.dropped: Counter[str] = Counter()
        for text, prompt, response in zip(frame["response"], prompt_ids, responses, strict=True):
            violations = check(text)
            response = np.array([*response, tokenizer.eos_token_id])
            if len(prompt) + len(response) > config.max_length:
                self.dropped[f"longer than data.max_length={config.max_length} tokens"] += 1
            elif violations:
                self.dropped[violations[0].split(" at character")[0]] += 1
            else:
                ids = torch.from_numpy(np.concatenate([np.array(prompt, dtype=np.int64), response]))
                mask = torch.zeros_like(ids)
                trained = config.get("train_inserted", False)
                mask[len(prompt) :] = 1 if trained else torch.from_numpy(loss_mask(response, tags, join_tokens))
                self.rows.append({"input_ids": ids, "position_ids": torch.arange(len(ids)), "loss_mask": mask})
        kept = f"{len(self.rows)} of {len(frame)} rows of {', '.join(map(str, files))}"
        if self.dropped:
            reasons = "; ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
            warnings.warn(f"{kept} kept; left out: {reasons}", RuntimeWarning, stacklevel=2)
        if not self.rows:
            raise ValueError(f"{kept} can be trained on: {dict(self.dropped)}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(self.rows[index])

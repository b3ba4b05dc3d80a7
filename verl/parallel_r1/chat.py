"""Where the assistant speaks in a chat, found in token ids alone.

Trainer and engine see token ids, not messages. A chat template marks each assistant turn with a header and an end, so
both can tell the answer from an instruction that merely explains the tags.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MARKER = "zq9"  # a text that no template contains


@dataclass(frozen=True)
class ChatFormat:
    """How a chat template looks in token ids.

    Attributes:
        start: ids with which every chat begins; a sequence that begins otherwise is plain text.
        header: ids that open an assistant turn, without trailing white space.
        end: ids any of which ends a turn.
    """

    start: tuple[int, ...]
    header: tuple[int, ...]
    end: tuple[int, ...]

    def to_json(self) -> dict[str, list[int]]:
        return {name: list(ids) for name, ids in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ChatFormat:
        return cls(**{name: tuple(ids) for name, ids in values.items()})

    def is_chat(self, ids: np.ndarray) -> bool:
        """Does the (n,) int64 sequence begin as a chat?"""
        return len(ids) >= len(self.start) and ids[: len(self.start)].tolist() == list(self.start)

    def turns(self, ids: np.ndarray) -> list[tuple[int, int | None]]:
        """Assistant turns of a chat: ``(first token after the header, index of the end id or None)``, in order."""
        n, width = len(ids), len(self.header)
        if n < width:
            return []
        hits = np.flatnonzero(ids[: n - width + 1] == self.header[0])
        for offset in range(1, width):
            hits = hits[ids[hits + offset] == self.header[offset]]
        ends = np.flatnonzero(np.isin(ids, self.end))
        turns: list[tuple[int, int | None]] = []
        over = 0  # a header inside a turn is text
        for hit in hits.tolist():
            begin = hit + width
            if over is None or hit < over:
                continue
            after = np.searchsorted(ends, begin)
            end = int(ends[after]) if after < len(ends) else None
            turns.append((begin, end))
            over = end
        return turns


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """The chat format of a tokenizer; None if it has no chat template, as everything is plain text then.

    Raises:
        ValueError: the template renders no assistant header, so that answers cannot be told from questions.
    """
    if not tokenizer.chat_template:
        return None

    def render(messages: list[dict[str, str]], generation: bool = False) -> str:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": MARKER}
    asked, invited = render([question]), render([question], generation=True)
    header = _common(encode(invited[len(asked) :]), encode(invited[len(asked) :].rstrip()))
    if not invited.startswith(asked) or not header:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} adds no assistant header with add_generation_prompt, so "
            "answers cannot be told from questions; give it one, as prepare-model does"
        )
    after = render([question, answer])[len(invited) :].partition(MARKER)[2].lstrip()
    ends = {tokenizer.eos_token_id, *(encode(after)[:1] if after else [])} - {None}
    first, second = encode(render([{"role": "user", "content": "other words"}])), encode(asked)
    marks = set(tokenizer.get_added_vocab().values())
    common = _common(first, second)
    start = common[: next((i for i, token in enumerate(common) if token not in marks), len(common))] or common[:1]
    return ChatFormat(tuple(start), tuple(header), tuple(sorted(ends)))


def _common(first: list[int], second: list[int]) -> list[int]:
    """Longest common prefix."""
    same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[: min(len(first), len(second)) if same is None else same]

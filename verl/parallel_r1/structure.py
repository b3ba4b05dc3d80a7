"""Token ids -> parallel blocks, and for every token its position and the keys hidden from it.

For a token in path k the keys that it may not see are one contiguous range: from the block's first ``<Path>`` to the
token's own ``<Path>``. So the structure of a sequence is three integers per token, ``(position, hidden_start,
hidden_end)``, and attention masks, positions and region labels all derive from them.

The rules, for any id sequence (a *pure function of the prefix*: what comes later never changes what came before):

- a trunk ``<Parallel>`` opens a block; a ``<Parallel>`` inside a block is ordinary text;
- inside a block each ``<Path>`` starts a path at ``position(<Parallel>) + 1`` that hides the block's earlier paths;
- ``</Parallel>`` closes the block at ``1 + the last position of the longest path``; everything is visible again;
- any other tag, or a tag where no rule names it, is ordinary text; text between ``</Path>`` and the next ``<Path>``
  belongs to the path before it;
- in a chat, tags count inside assistant turns only, and a block that is open when its turn ends is closed by the token
  that ends the turn.

Source: Parallel-R1 (arXiv 2509.07980), "Unseen" variant; positions as in the published code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from parallel_r1.chat import ChatFormat
from parallel_r1.tags import TagIds

REGIONS = ("trunk", "path", "summary", "after")
TRUNK, PATH, SUMMARY, AFTER = range(4)


@dataclass(frozen=True)
class Block:
    """One parallel block; indices into the sequence.

    Attributes:
        start: index of ``<Parallel>``.
        paths: half-open ranges, one per path, each beginning at its ``<Path>``.
        end: index of ``</Parallel>`` (or of the token that ended the turn), or None while the block is open.
    """

    start: int
    paths: tuple[tuple[int, int], ...]
    end: int | None


@dataclass(frozen=True)
class Structure:
    """Structure of one sequence of n tokens.

    Attributes:
        position_ids: (n,) int64, rotary positions.
        hidden_start: (n,) int64; token i may not attend to keys in ``[hidden_start[i], hidden_end[i])``.
        hidden_end: (n,) int64; equal to ``hidden_start`` where nothing is hidden (trunk and first paths).
        blocks: the blocks found, in order.
    """

    position_ids: np.ndarray
    hidden_start: np.ndarray
    hidden_end: np.ndarray
    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.position_ids)

    @property
    def critical_tokens(self) -> int:
        """Tokens on the critical path: the whole sequence if all paths of a block were decoded at once."""
        return int(self.position_ids.max()) + 1 if len(self) else 0


def annotate(
    input_ids: Sequence[int] | np.ndarray, tags: TagIds, start: int = 0, chat: ChatFormat | None = None
) -> Structure:
    """Structure of ``input_ids``, n token ids.

    Args:
        tags: ids of the six tags.
        start: tags before this index (a prompt) are ordinary text.
        chat: if the sequence is a chat of this format, tags outside assistant turns are ordinary text.

    Defined for every sequence and never raises on its content. Cost: NumPy over tokens, Python over tags and turns.
    """
    ids = np.asarray(input_ids, dtype=np.int64).reshape(-1)
    n = len(ids)
    position = np.arange(n, dtype=np.int64)
    hidden_start = np.zeros(n, dtype=np.int64)
    hidden_end = np.zeros(n, dtype=np.int64)
    blocks: list[Block] = []

    shift = 0  # position = index - shift for the tokens from the last event on
    done = 0  # tokens written so far
    opened = None  # index of the open block's <Parallel>
    paths: list[int] = []  # index of each <Path> of the open block
    longest = 0  # last position of the longest path so far

    def write(to: int) -> None:
        nonlocal done
        if shift:
            position[done:to] -= shift
        if len(paths) > 1:
            hidden_start[done:to] = paths[0]
            hidden_end[done:to] = paths[-1]
        done = to

    for i, event in _events(ids, tags, max(start, 0), chat):
        if opened is None:
            if event == tags.parallel_open:
                opened, paths = i, []
            continue
        if event == tags.path_open:
            write(i)
            if paths:
                longest = max(longest, int(position[i - 1]))
                shift = i - int(position[paths[0]])
            else:
                longest = int(position[i - 1])
            paths.append(i)
        elif event in (tags.parallel_close, END_OF_TURN):
            write(i)
            if paths:
                longest = max(longest, int(position[i - 1]))
                shift = i - (longest + 1)
            blocks.append(_block(opened, paths, i))
            opened, paths = None, []
    write(n)
    if opened is not None:
        blocks.append(_block(opened, paths, None, n))
    return Structure(position, hidden_start, hidden_end, tuple(blocks))


END_OF_TURN = -1  # an event like the ids of the tags, which are not negative


def _events(ids: np.ndarray, tags: TagIds, start: int, chat: ChatFormat | None) -> Iterator[tuple[int, int]]:
    """``(index, tag id or END_OF_TURN)`` wherever the structure may change."""
    marks = np.flatnonzero((ids == tags.parallel_open) | (ids == tags.parallel_close) | (ids == tags.path_open))
    marks = marks[np.searchsorted(marks, start) :]
    if chat is None or not chat.is_chat(ids):
        yield from zip(marks.tolist(), ids[marks].tolist(), strict=True)
        return
    for begin, end in chat.turns(ids):
        stop = len(marks) if end is None else np.searchsorted(marks, end)
        inside = marks[np.searchsorted(marks, begin) : stop]
        yield from zip(inside.tolist(), ids[inside].tolist(), strict=True)
        if end is not None:
            yield end, END_OF_TURN


def _block(start: int, paths: list[int], end: int | None, n: int | None = None) -> Block:
    bounds = [*paths, end if end is not None else n]
    return Block(start, tuple((bounds[k], bounds[k + 1]) for k in range(len(paths))), end)


def regions(input_ids: Sequence[int] | np.ndarray, structure: Structure, tags: TagIds) -> np.ndarray:
    """(n,) int8, an index into :data:`REGIONS` per token.

    A ``<Parallel>`` belongs to the trunk before it; a summary reaches from ``</Parallel>`` through ``</Summary>``.
    """
    ids = np.asarray(input_ids, dtype=np.int64).reshape(-1)
    region = np.full(len(ids), TRUNK, dtype=np.int8)
    opens, closes = (np.flatnonzero(ids == tag) for tag in (tags.summary_open, tags.summary_close))
    limits = [*(block.start for block in structure.blocks), len(ids)][1:]
    for block, limit in zip(structure.blocks, limits, strict=True):
        if block.end is None:
            region[block.start + 1 :] = PATH
            continue
        region[block.start + 1 : block.end] = PATH
        region[block.end :] = AFTER
        opened = opens[np.searchsorted(opens, block.end) :][:1]
        if len(opened) and opened[0] < limit:
            closed = closes[np.searchsorted(closes, opened[0]) :][:1]
            region[block.end : min(limit, closed[0] + 1 if len(closed) else limit)] = SUMMARY
    return region

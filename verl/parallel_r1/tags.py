"""The six tags of parallel thinking: their text, their token ids, and how they get into a model.

Source: Parallel-R1 (arXiv 2509.07980), section 3; the published release appends the same six strings to the tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PARALLEL_OPEN = "<Parallel>"
PARALLEL_CLOSE = "</Parallel>"
PATH_OPEN = "<Path>"
PATH_CLOSE = "</Path>"
SUMMARY_OPEN = "<Summary>"
SUMMARY_CLOSE = "</Summary>"

TAGS = (PARALLEL_OPEN, PARALLEL_CLOSE, PATH_OPEN, PATH_CLOSE, SUMMARY_OPEN, SUMMARY_CLOSE)


class TagIds(NamedTuple):
    """Token ids of the six tags, in the order of :data:`TAGS`."""

    parallel_open: int
    parallel_close: int
    path_open: int
    path_close: int
    summary_open: int
    summary_close: int


def tag_ids(tokenizer: PreTrainedTokenizerBase) -> TagIds:
    """Ids of the six tags in ``tokenizer``.

    Raises:
        ValueError: a tag is not one single token, or two tags share an id.
    """
    ids = [tokenizer.encode(tag, add_special_tokens=False) for tag in TAGS]
    split = [tag for tag, pieces in zip(TAGS, ids, strict=True) if len(pieces) != 1]
    if split:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} splits {', '.join(split)} into several tokens; "
            "add the tags to the model first (parallel_r1.tags.add_tags)"
        )
    flat = [pieces[0] for pieces in ids]
    if len(set(flat)) != len(flat):
        found = dict(zip(TAGS, flat, strict=True))
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} maps two tags to one id: {found}")
    return TagIds(*flat)


def add_tags(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TagIds:
    """Add the six tags to ``tokenizer`` and ``model`` in place; each gets a row of its own.

    A tag's input embedding (and its output embedding where the two are not tied) becomes the mean over the pieces that
    its text had before. Unused rows of a released model are often all identical, and tags that start there cannot be
    told apart. The tags are ordinary added tokens, not *special* ones, so ``decode(skip_special_tokens=True)`` keeps
    them. Tags that are single tokens already keep their rows.

    Raises:
        ValueError: see :func:`tag_ids`.
    """
    import torch
    from tokenizers import AddedToken

    pieces = {tag: tokenizer.encode(tag, add_special_tokens=False) for tag in TAGS}
    missing = [tag for tag in TAGS if len(pieces[tag]) > 1]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in missing])
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = dict(zip(TAGS, tag_ids(tokenizer), strict=True))
    tables = [model.get_input_embeddings().weight]
    output = model.get_output_embeddings()
    if output is not None and output.weight.data_ptr() != tables[0].data_ptr():
        tables.append(output.weight)
    with torch.no_grad():
        for table in tables:
            for tag in missing:
                table[ids[tag]] = table[pieces[tag]].mean(dim=0)
    return TagIds(*(ids[tag] for tag in TAGS))

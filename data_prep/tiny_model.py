"""A Qwen3 of about half a million random parameters with its own tokenizer, six tags added.

    python data_prep/tiny_model.py --corpus runs/quickstart/data/cold_start.parquet --out runs/quickstart/model --seed 1

The tokenizer is a byte-level BPE trained on the corpus; digits stay single tokens, so numbers have one spelling.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from parallel_r1.tags import TAGS, add_tags

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def build_tokenizer(texts: list[str], vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Byte-level BPE over ``texts`` with Qwen's chat markers; the tags are not part of it yet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, **sizes: int) -> Qwen3ForCausalLM:
    """A three-layer Qwen3 with random weights; ``sizes`` are keys of its configuration that differ."""
    torch.manual_seed(seed)
    tiny = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
    }
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **{**tiny, **sizes},
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def read_corpus(path: Path) -> list[str]:
    """Questions and traces without their tags.

    Raises:
        ValueError: the file lacks a column.
    """
    frame = pd.read_parquet(path)
    missing = {"prompt", "response"} - set(frame.columns)
    if missing:
        raise ValueError(f"{path} has no column {sorted(missing)}; it has {list(frame.columns)}")
    texts = [f"user\n{prompt[-1]['content']}\nassistant\n" for prompt in frame["prompt"]]
    for text in frame["response"]:
        for tag in TAGS:
            text = text.replace(tag, "")
        texts.append(text)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="parquet with the columns prompt and response")
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"tiny_model.py: {args.out} is not empty; choose another folder or remove it")
    try:
        texts = read_corpus(args.corpus)
    except (ValueError, OSError) as error:
        sys.exit(f"tiny_model.py: {error}")
    tokenizer = build_tokenizer(texts)
    model = build_model(tokenizer, args.seed)
    ids = add_tags(model, tokenizer)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens, tags {ids._asdict()}")


if __name__ == "__main__":
    main()

"""Small random models whose output depends strongly on mask and positions, to test structured attention with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from parallel_r1.tags import add_tags

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data_prep"))

from tiny_model import build_tokenizer  # noqa: E402


def sharp_model(out: Path, family: str = "qwen3", seed: int = 0, loud: float = 1.0) -> Path:
    """Save a two-layer model of ``family`` ("qwen3" or "llama") with tags and tokenizer to ``out``.

    ``loud`` above 1 makes a Qwen3 open blocks often.

    A freshly initialised model hardly attends to anything in particular, and would pass a parity test with any mask.
    """
    tokenizer: PreTrainedTokenizerFast = build_tokenizer(["Janet has 3 apples and 4 pears. How many fruits?"] * 3)
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": family == "qwen3",
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config, cls = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[family]
    model = cls(config(**sizes, dtype="float32"))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5)
        elif "q_norm" in name or "k_norm" in name:
            torch.nn.init.constant_(parameter, 1.6)
    add_tags(model, tokenizer)
    with torch.no_grad():  # mean rows are small; the tags must matter as much as other tokens
        tags = 0.15 * torch.randn(6, sizes["hidden_size"])
        tags[0] *= loud  # with tied embeddings, the further a row reaches the more often its token is sampled
        model.get_input_embeddings().weight[-6:] = tags
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out

"""What turns a plain vLLM engine into the structured one; imports neither torch nor vLLM."""

from __future__ import annotations

import os
from typing import Any

ROPE_SECTION = "mrope_section"  # its presence makes vLLM carry three position rows per token
CONFIG_KEY = "parallel_r1"  # key of the model's configuration under which tags and chat format travel to the engine
ARCHITECTURES = {
    "Qwen3ForCausalLM": "StructuredQwen3ForCausalLM",
    "LlamaForCausalLM": "StructuredLlamaForCausalLM",
}


def vllm_kwargs(model_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Keyword arguments for ``vllm.LLM(model_path, **kwargs)`` (or ``AsyncEngineArgs``) with structured attention.

    Sibling paths in a prompt are hidden from each other and share positions, exactly as
    :func:`parallel_r1.structure.annotate` says; everything else is stock vLLM.

    Args:
        model_path: Hugging Face model with the six tags (:func:`parallel_r1.tags.add_tags`).

    Raises:
        ValueError: the architecture has no structured class, or the tags are missing.
    """
    from transformers import AutoConfig, AutoTokenizer

    from parallel_r1.chat import chat_format
    from parallel_r1.tags import tag_ids

    config = AutoConfig.from_pretrained(model_path)
    found = next((name for name in config.architectures or [] if name in ARCHITECTURES), None)
    if found is None:
        raise ValueError(
            f"{model_path}: no structured engine for {config.architectures}, only for {', '.join(ARCHITECTURES)}"
        )
    if getattr(config, "use_sliding_window", False):
        raise ValueError(f"{model_path}: sliding-window attention is not supported; set use_sliding_window=false")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    chat = chat_format(tokenizer)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "hf_overrides": {
            "architectures": [ARCHITECTURES[found]],
            "rope_parameters": {**config.rope_parameters, ROPE_SECTION: [head_dim // 2, 0, 0]},
            CONFIG_KEY: {"tags": list(tag_ids(tokenizer)), "chat": chat.to_json() if chat else None},
        },
        "compilation_config": {"cudagraph_mode": "PIECEWISE"},  # a full graph would be replayed without the mask
    }

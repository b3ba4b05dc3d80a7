"""Qwen3 and Llama for vLLM with structured attention: positions and hidden key ranges, out of tree.

vLLM carries three position numbers per token for models with M-RoPE, through chunked prefill, prefix caching and
preemption. Here row 0 is the rotary position, rows 1 and 2 are ``[hidden_start, hidden_end)``. For generated tokens
vLLM fills all rows with ``index + delta``: nothing hidden, which is right, since a rollout never generates the start of
a second path. Before each forward pass the hidden ranges are handed to the attention backend.

Source: the M-RoPE interface of vLLM 0.24 and 0.28 (``vllm.model_executor.models.interfaces.SupportsMRoPE``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.sequence import IntermediateTensors

from parallel_r1.chat import ChatFormat
from parallel_r1.rollout.engine_kwargs import CONFIG_KEY, ROPE_SECTION
from parallel_r1.rollout.hidden_rows import publish
from parallel_r1.structure import annotate
from parallel_r1.tags import TagIds


class Structured:
    """Mix-in before a causal language model of vLLM; with it the model supports vLLM's M-RoPE interface.

    Raises:
        ValueError: on construction, an engine option under which tokens would be computed without their structure.
    """

    supports_mrope = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any):
        _refuse_unsupported(vllm_config)
        config = vllm_config.model_config.hf_config
        switch = getattr(config, CONFIG_KEY)
        # ROPE_SECTION makes the runner carry three rows; the layers get row 0 and the ordinary rotary embedding
        rope = config.rope_parameters
        config.rope_parameters = {name: value for name, value in rope.items() if name != ROPE_SECTION}
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        finally:
            config.rope_parameters = rope
        stock = {
            type(layer.impl).__name__
            for layer in self.modules()
            if isinstance(layer, Attention) and not getattr(layer.impl, "structured", False)
        }
        if stock:
            raise ValueError(
                f"attention backend {', '.join(stock)} would skip the mask; the structured engine has backends for "
                "CPU_ATTN and FLASH_ATTN: set attention_backend=FLASH_ATTN"
            )
        self.tags = TagIds(*switch["tags"])
        self.chat = ChatFormat.from_json(switch["chat"]) if switch["chat"] else None

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Any = None, **_: Any
    ) -> tuple[torch.Tensor, int]:
        """Rows ``(position, hidden_start, hidden_end)`` of a prompt, (3, n), and what to add to later indices.

        Raises:
            ValueError: the prompt ends inside a second or later path, whose continuation would see its siblings.
        """
        structure = annotate(input_tokens, self.tags, chat=self.chat)
        n = len(structure)
        if n and structure.hidden_end[-1] > structure.hidden_start[-1]:
            raise ValueError(
                f"the prompt of {n} tokens ends inside path {len(structure.blocks[-1].paths)} of a block; decode each "
                "path as a first path, without its siblings, and join them afterwards (parallel_r1.rollout.fork_join)"
            )
        rows = np.stack([structure.position_ids, structure.hidden_start, structure.hidden_end])
        return torch.from_numpy(rows), int(structure.position_ids[-1]) + 1 - n if n else 0

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if positions.ndim == 2:
            publish(positions[1:], get_forward_context().attn_metadata)
            positions = positions[0]
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    refused = {
        "cudagraph_mode with full graphs (use PIECEWISE): a replayed graph would skip the mask": (
            compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs()
        ),
        "speculative decoding": vllm_config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "dual batch overlap": bool(getattr(parallel, "enable_dbo", False)),
        "a quantised key-value cache": vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16"),
    }
    found = [name for name, used in refused.items() if used]
    if found:
        raise ValueError(f"the structured rollout engine does not support {'; '.join(found)}")


class StructuredQwen3ForCausalLM(Structured, Qwen3ForCausalLM):
    pass


class StructuredLlamaForCausalLM(Structured, LlamaForCausalLM):
    pass

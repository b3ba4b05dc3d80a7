"""verl's FSDP engine with structured attention, on CPU and CUDA; imported in training processes through
``model.external_lib``.

With ``attn_implementation: parallel_r1`` a micro batch is packed into one row without padding, the structure of each
sequence is derived from its token ids, and positions and mask follow from it: in old log-probabilities, reference and
update alike. Any other ``attn_implementation`` is left to verl. What this engine does not support it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from parallel_r1 import attention
from parallel_r1.chat import chat_format
from parallel_r1.config import ATTENTION, STRUCTURE_KEY
from parallel_r1.structure import Structure, annotate
from parallel_r1.tags import tag_ids

attention.register()

CHUNK = 1024  # tokens whose float32 logits exist at a time


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="nvidia")
class StructuredFSDPEngine(FSDPEngineWithLMHead):
    """verl's engine; what differs is below.

    Raises:
        ValueError: on construction or on a batch, an option that structured attention does not support.
    """

    def __init__(
        self,
        model_config: HFModelConfig,
        engine_config: FSDPEngineConfig,
        optimizer_config: FSDPOptimizerConfig,
        checkpoint_config: CheckpointConfig,
    ):
        config = model_config.hf_config
        self.structured = config._attn_implementation == ATTENTION
        if self.structured:
            _refuse(
                {
                    "use_remove_padding=false": not model_config.use_remove_padding,
                    "ulysses_sequence_parallel_size > 1": engine_config.ulysses_sequence_parallel_size > 1,
                    "pad_to_length": engine_config.pad_to_length,
                    "use_fused_kernels": model_config.use_fused_kernels,
                    "use_sliding_window": getattr(config, "use_sliding_window", False),
                }
            )
            self.annotate = annotator(model_config.tokenizer, getattr(config, STRUCTURE_KEY, None))
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        if get_device_name() != "cpu":
            return super()._build_fsdp_module(module)
        # A forward-only (reference) engine would get CPUOffloadPolicy(pin_memory=True), and pinning needs a GPU.
        forward_only = self.engine_config.forward_only
        object.__setattr__(self.engine_config, "forward_only", False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            object.__setattr__(self.engine_config, "forward_only", forward_only)

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """verl's packed inputs, with positions from the structure and the structure itself for the attention."""
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        if self.structured:
            packed = micro_batch["input_ids"]
            rows = np.split(packed.values().cpu().numpy(), packed.offsets()[1:-1].cpu().numpy())
            structure = attention.PackedStructure([self.annotate(row) for row in rows], packed.values().device)
            model_inputs |= {"position_ids": structure.position_ids, "structure": structure}
        return model_inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Callable
    ) -> dict[str, torch.Tensor]:
        """Log-probability (and entropy) of every token given the one before, as jagged (batch, tokens) tensors.

        Without a flash-attn kernel verl loops over tokens in Python here; this is a call per :data:`CHUNK` tokens.
        """
        if not self.structured:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        refused = ("calculate_sum_pi_squared", "distillation_use_topk", "use_fused_kernels", "distillation_only")
        _refuse({name: tu.get_non_tensor_data(micro_batch, name, default=False) for name in refused})
        offsets = micro_batch["input_ids"].offsets()
        log_probs, entropy = token_statistics(
            output.logits[0],
            output_args["input_ids_rmpad_rolled"],
            output_args["temperature_rmpad"],
            entropy=tu.get_non_tensor_data(micro_batch, "calculate_entropy", default=False),
        )
        outputs = {"log_probs": torch.nested.nested_tensor_from_jagged(log_probs, offsets)}
        if entropy is not None:
            outputs["entropy"] = torch.nested.nested_tensor_from_jagged(entropy, offsets)
        return outputs


def annotator(tokenizer: PreTrainedTokenizerBase, kind: str | None) -> Callable[[np.ndarray], Structure]:
    """Token ids of a sequence -> its structure.

    Args:
        kind: "turns" (tags count where the assistant speaks), "everywhere" (in the prompt too, as in the published
            code) or "causal" (nowhere: the Seen variant).

    Raises:
        ValueError: another kind.
    """
    tags = tag_ids(tokenizer)
    if kind == "causal":
        return lambda ids: annotate(ids, tags, start=len(ids))
    if kind == "everywhere":
        return lambda ids: annotate(ids, tags)
    if kind == "turns":
        chat = chat_format(tokenizer)
        return lambda ids: annotate(ids, tags, chat=chat)
    raise ValueError(
        f"model.override_config.{STRUCTURE_KEY} is {kind!r}; it must be causal, turns or everywhere "
        "(parallel_r1.variant sets it)"
    )


def token_statistics(
    logits: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor, *, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of ``labels`` and, if asked for, entropies; float32, both (tokens,).

    Args:
        logits: (tokens, vocabulary), any float type; their float32 copies are made, and made again for the backward
            pass, a chunk at a time.
        labels: (tokens,).
        temperature: (tokens,).
    """

    def statistics(logits: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, ...]:
        log_probs = (logits.float() / temperature[:, None]).log_softmax(dim=-1)
        chosen = log_probs.gather(-1, labels[:, None])[:, 0]
        return (chosen, -(log_probs.exp() * log_probs).sum(dim=-1)) if entropy else (chosen,)

    parts = [
        checkpoint(statistics, *chunk, use_reentrant=False) if len(logits) > CHUNK else statistics(*chunk)
        for chunk in zip(logits.split(CHUNK), labels.split(CHUNK), temperature.split(CHUNK), strict=True)
    ]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return columns[0], columns[1] if entropy else None


def _refuse(options: dict[str, bool]) -> None:
    used = [name for name, value in options.items() if value]
    if used:
        raise ValueError(f"attn_implementation={ATTENTION} does not support {', '.join(used)}; turn it off")

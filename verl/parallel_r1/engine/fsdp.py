"""verl's FSDP engine on a CPU; imported in every training process through ``model.external_lib``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.torch_functional import entropy_from_logits
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
class CPUFSDPEngineWithLMHead(FSDPEngineWithLMHead):
    """Causal training engine on CPU ranks; what differs from the stock class is below."""

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        # A forward-only (reference) engine would get CPUOffloadPolicy(pin_memory=True), and pinning needs a GPU.
        forward_only = self.engine_config.forward_only
        object.__setattr__(self.engine_config, "forward_only", False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            object.__setattr__(self.engine_config, "forward_only", forward_only)

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Callable
    ) -> dict[str, torch.Tensor]:
        """Log-probability (and entropy) of every token given the one before, as jagged (batch, tokens) tensors.

        Without a flash-attn kernel verl takes the log-sum-exp token by token in a Python list, a node of the backward
        graph for each; here it is one call. Anything but a plain padded forward goes to verl.
        """
        unusual = ("calculate_sum_pi_squared", "distillation_use_topk", "use_fused_kernels")
        if any(tu.get_non_tensor_data(micro_batch, key, default=False) for key in unusual) or tu.get_non_tensor_data(
            micro_batch, "use_remove_padding", default=True
        ):
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        offsets = micro_batch["input_ids"].offsets()
        lengths = offsets.diff()
        logits = output.logits
        keep = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
        logits = logits[keep] / output_args["temperature"].repeat_interleave(lengths)[:, None]  # (tokens, vocabulary)
        labels = output_args["input_ids_rmpad_rolled"]
        log_probs = logits.log_softmax(dim=-1).gather(-1, labels[:, None])[:, 0]
        outputs = {"log_probs": torch.nested.nested_tensor_from_jagged(log_probs, offsets)}
        if tu.get_non_tensor_data(micro_batch, "calculate_entropy", default=False):
            outputs["entropy"] = torch.nested.nested_tensor_from_jagged(entropy_from_logits(logits), offsets)
        return outputs

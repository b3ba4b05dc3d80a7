"""verl's FSDP engine on a CPU; imported in every training process through ``model.external_lib``."""

from __future__ import annotations

import torch
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

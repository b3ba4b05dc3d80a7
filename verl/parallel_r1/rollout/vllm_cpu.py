"""vLLM worker extension for weight sync on a CPU.

Selected with ``rollout.engine_kwargs.vllm.worker_extension_cls``. What stock code cannot do there:

- received tensors are views of the sender's shared-memory segment, which is closed afterwards: they are cloned;
- vLLM's CPU backend packs linear weights and drops the originals, so ``load_weights`` cannot run a second time: the
  layer-wise reload restores the layers first;
- a tied ``lm_head`` keeps a packed handle of its own that the reload skips with a mere warning, and the engine would go
  on sampling from the old output embedding: its weights are packed again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


def reload(runner: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load ``weights`` (Hugging Face names) into the model of a vLLM CPU model runner that has loaded before."""
    runner.reload_weights(weights_iterator=iter(weights))
    for module in runner.model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel() > 0:
            module.quant_method.process_weights_after_loading(module)


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """verl's colocated worker extension with a weight update that works on a CPU."""

    def update_weights_from_ipc(
        self, peft_config: dict | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Receive all weights from the trainer, then reload the model.

        Raises:
            ValueError: a LoRA adapter was sent; the CPU engine takes full weights only.
        """
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

        if peft_config:
            raise ValueError("LoRA weight sync is not supported on CPU; set actor_rollout_ref.model.lora_rank=0")
        weights: list[tuple[str, torch.Tensor]] = []
        receiver = BucketedWeightReceiver(
            zmq_handle=self._get_zmq_handle(), device=torch.device("cpu"), use_shm=use_shm
        )
        receiver.receive_weights(
            on_bucket_received=lambda bucket, last: weights.extend((name, w.clone()) for name, w in bucket)
        )
        reload(self.model_runner, weights)

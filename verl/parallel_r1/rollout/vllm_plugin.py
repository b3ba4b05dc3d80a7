"""Entry point ``vllm.general_plugins``: runs in every vLLM process, before a model is built."""

from __future__ import annotations

from parallel_r1.rollout.engine_kwargs import ARCHITECTURES

_registered = False


def register() -> None:
    """Make the structured models and attention backends known to vLLM; again is harmless.

    A stock model runs as before: the backends act only on steps of a structured model.
    """
    global _registered
    if _registered:
        return
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"parallel_r1.rollout.vllm_model:{name}")
    module = "parallel_r1.rollout.{}".format
    register_backend(AttentionBackendEnum.CPU_ATTN, module("vllm_cpu_attention.StructuredCPUAttentionBackend"))
    register_backend(AttentionBackendEnum.FLASH_ATTN, module("vllm_flash_attention.StructuredFlashAttentionBackend"))
    _registered = True


def is_registered() -> bool:
    """Did vLLM load the plug-in in this process?"""
    return _registered

"""Entry point ``vllm.general_plugins``: runs in every vLLM process, before a model is built."""

from __future__ import annotations

_registered = False


def register() -> None:
    """Mark this process as one that runs with the plug-in; :mod:`parallel_r1.doctor` asks for it."""
    global _registered
    _registered = True


def is_registered() -> bool:
    """Did vLLM load the plug-in in this process?"""
    return _registered

"""Rollouts that fork at ``<Parallel>`` and join: the state machine, verl's agent loop, the structured vLLM engine."""

from parallel_r1.rollout.engine_kwargs import vllm_kwargs

__all__ = ["vllm_kwargs"]

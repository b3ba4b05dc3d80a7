"""verl agent loop that decodes with :class:`parallel_r1.rollout.fork_join.ForkJoin`.

Named ``parallel`` in ``configs/agent_loops.yaml``; select it with
``actor_rollout_ref.rollout.agent.default_agent_loop=parallel``.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from omegaconf import DictConfig, OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput
from verl.utils.profiler import simple_timer

from parallel_r1.config import ParallelConfig, RolloutConfig
from parallel_r1.rollout.fork_join import ForkJoin, Sampled, Segment

# Agent loops live for one sample only; what all samples of a process share is made once.
_shared: dict[str, Any] = {}


def _config(config: DictConfig) -> ParallelConfig:
    if "config" not in _shared:
        _shared["config"] = ParallelConfig.from_mapping(OmegaConf.to_container(config.parallel_r1))
    return _shared["config"]


def _machine(tokenizer: Any, model_path: str, max_tokens: int, config: RolloutConfig) -> ForkJoin:
    if "machine" not in _shared:
        _shared["machine"] = ForkJoin.for_model(tokenizer, model_path, config, max_tokens)
    return _shared["machine"]


class ParallelAgentLoop(AgentLoopBase):
    """One sample: prompt -> fork/join decoding -> response ids, mask (0 on inserted tokens) and engine log-probs.

    With ``fidelity: paper`` the mask is 1 on inserted tokens as well, as in the published code; ``inserted`` in the
    extra fields keeps their indices.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = _config(self.config)
        self.train_inserted = config.fidelity == "paper"
        model_path = self.config.actor_rollout_ref.model.path
        self.machine = _machine(self.tokenizer, model_path, self.rollout_config.response_length, config.rollout)

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        prompt_ids = await self.ct_build_initial_tokens(list(kwargs["raw_prompt"]))
        rollout_id, versions = uuid4().hex, []

        async def generate(prefix: list[int], sampling: dict[str, Any], segment: Segment) -> Sampled:
            output = await self.server_manager.generate(
                request_id=rollout_id, prompt_ids=prefix, sampling_params=sampling
            )
            if output.extra_fields.get("global_steps") is not None:
                versions.append(output.extra_fields["global_steps"])
            token_ids = list(output.token_ids)
            log_probs = list(output.log_probs) if output.log_probs else [0.0] * len(token_ids)
            return Sampled(token_ids, log_probs)

        timing: dict[str, float] = {}
        try:
            with simple_timer("generate_sequences", timing):
                place = (*(int(kwargs.get(key) or 0) for key in ("global_steps", "index", "session_id")), *prompt_ids)
                rollout = await self.machine.run(generate, prompt_ids, sampling_params, place)
        finally:
            self.server_manager.finish(rollout_id)
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=rollout.token_ids,
            response_mask=[1] * len(rollout.mask) if self.train_inserted else rollout.mask,
            response_logprobs=rollout.log_probs if sampling_params.get("logprobs") else None,
            num_turns=2,
            metrics=AgentLoopMetrics(generate_sequences=timing["generate_sequences"]),
            extra_fields={
                "min_global_steps": min(versions, default=None),
                "max_global_steps": max(versions, default=None),
                "turn_scores": [],
                "tool_rewards": [],
                "truncated": rollout.truncated,
                "forced_closers": rollout.forced_closers,
                "failed_paths": rollout.failed_paths,
                "inserted": rollout.inserted,
                "spans": [(*span.segment, span.start, span.end) for span in rollout.spans],
            },
        )

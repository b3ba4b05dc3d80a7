"""What ``parallel_r1.variant`` and ``parallel_r1.fidelity`` mean, written into verl's and vLLM's own keys.

| setting                            | exact (default)                                | paper              |
| ---------------------------------- | ---------------------------------------------- | ------------------ |
| engine attention during rollout    | structured when training is structured         | stock, causal      |
| inserted tokens in the loss        | masked out                                     | trained            |
| after the last allowed block       | ``<Parallel>`` forbidden, goes on to an answer | stops              |
| tags in a prompt                   | ordinary text                                  | parsed as structure |
| grader                             | robust                                         | last 300 characters |

"Exact" is exact for the unseen variant, and for seen with ``rollout.mode: sequential``. Forked rollouts of the seen
variant decode later paths without their siblings and train them with: the mismatch monitor shows by how much.
"""

from __future__ import annotations

import warnings
from typing import Any

from omegaconf import DictConfig, OmegaConf

from parallel_r1.config import ATTENTION, STRUCTURE_KEY, ParallelConfig
from parallel_r1.rewards import schedule
from parallel_r1.rollout import vllm_kwargs


def parallel_config(config: DictConfig) -> ParallelConfig:
    """The checked ``parallel_r1:`` section of a training configuration.

    Raises:
        ValueError: see :meth:`ParallelConfig.from_mapping`.
    """
    return ParallelConfig.from_mapping(OmegaConf.to_container(config.parallel_r1, resolve=True))


def structure_kind(parallel: ParallelConfig) -> str:
    """Where tags make structure in training: "causal", "turns" or "everywhere"."""
    if parallel.variant == "seen":
        return "causal"
    return "turns" if parallel.fidelity == "exact" else "everywhere"


def apply(config: DictConfig) -> ParallelConfig:
    """Write variant and fidelity into ``config``, an SFT or an RL configuration, in place.

    Raises:
        ValueError: settings that contradict each other.
    """
    parallel = parallel_config(config)
    rl = "actor_rollout_ref" in config
    model = config.actor_rollout_ref.model if rl else config.model
    attention = model.override_config.get("attn_implementation")
    if parallel.variant == "unseen" and attention != ATTENTION:
        raise ValueError(
            f"parallel_r1.variant=unseen needs attn_implementation={ATTENTION}, not {attention}: nothing else hides "
            "sibling paths"
        )
    paper = parallel.fidelity == "paper"
    chosen = (parallel.rollout.path_temperature, parallel.rollout.path_top_p)
    if rl and chosen != (None, None):
        warnings.warn(
            f"paths are sampled with temperature and top-p {chosen} of their own but trained as the policy itself: "
            "off-policy by choice, which mismatch/* does not show",
            RuntimeWarning,
            stacklevel=2,
        )
    _set(model, f"override_config.model_config.{STRUCTURE_KEY}", structure_kind(parallel))
    if not rl:
        _set(config, "data.train_inserted", paper)
        return parallel
    _set(config, "parallel_r1.rollout.stop_after_blocks", paper or parallel.rollout.stop_after_blocks)
    _set(config, "parallel_r1.reward.grader", parallel.reward.grader or ("reference" if paper else "robust"))
    schedule.check(parallel.reward)
    if not paper and parallel.variant == "unseen" and parallel.rollout.mode == "sequential":
        raise ValueError(
            "parallel_r1.rollout.mode=sequential decodes blocks causally, which variant=unseen does not train; use "
            "mode=forked, variant=seen or fidelity=paper"
        )
    return parallel


def engine_options(parallel: ParallelConfig, model_path: str) -> dict[str, Any]:
    """vLLM keyword arguments of the rollout engine of a run: the structured engine, or none for the stock one.

    Raises:
        ValueError: see :func:`parallel_r1.rollout.vllm_kwargs`.
    """
    if parallel.variant == "unseen" and parallel.fidelity == "exact":
        return vllm_kwargs(model_path)
    return {}


def apply_to_engine(config: DictConfig, parallel: ParallelConfig) -> None:
    """Write :func:`engine_options` into an RL configuration whose model exists; in place.

    Raises:
        ValueError: the configuration quantises the engine's weights, which needs the same vLLM option.
    """
    options = engine_options(parallel, config.actor_rollout_ref.model.path)
    if not options:
        return
    rollout = config.actor_rollout_ref.rollout
    if rollout.get("quantization"):
        raise ValueError("the structured rollout engine does not support actor_rollout_ref.rollout.quantization")
    chosen = OmegaConf.select(rollout, "engine_kwargs.vllm") or {}  # a user's own options win
    _set(rollout, "engine_kwargs.vllm", OmegaConf.merge(options, chosen))


def _set(config: DictConfig, key: str, value: Any) -> None:
    OmegaConf.update(config, key, value, merge=False, force_add=True)

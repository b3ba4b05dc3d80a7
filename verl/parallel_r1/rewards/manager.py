"""verl reward manager: response ids -> reward of the phase in force, and what is logged with it.

verl's stock managers pass neither the global step nor whether a sample is for validation; both are needed here, since
the reward alternates with the step while validation always pays accuracy.
"""

from __future__ import annotations

import asyncio
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from parallel_r1.config import ParallelConfig
from parallel_r1.rewards.reward import score
from parallel_r1.rewards.schedule import VALIDATION_RECIPE, scheduled
from parallel_r1.structure import annotate
from parallel_r1.tags import tag_ids

VALIDATION_KEY = "is_validation"


class ParallelRewardManager(RewardManagerBase):
    """Scores one response at a time; no state beyond the configuration."""

    def __init__(self, config: DictConfig, tokenizer: PreTrainedTokenizerBase, compute_score: Any, **_: Any):
        super().__init__(config, tokenizer, compute_score)
        self.reward = ParallelConfig.from_mapping(OmegaConf.to_container(config.parallel_r1)).reward
        self.tags = tag_ids(tokenizer)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Reward of the last row of ``data`` (the whole response of a trajectory)."""
        item = data[-1]
        fields = item.non_tensor_batch
        response_ids = item.batch["responses"].numpy()
        validate = bool(fields.get(VALIDATION_KEY, False))
        step = int(fields["global_steps"])
        recipe = VALIDATION_RECIPE if validate else scheduled(step, self.reward)[0]
        text = self.tokenizer.decode(response_ids, skip_special_tokens=True)
        gold, grader = fields["reward_model"]["ground_truth"], self.reward.grader or "robust"
        # in a thread: an answer that is hard to grade holds up nobody else's
        result = await asyncio.to_thread(score, recipe, text, gold, step, grader)
        info: dict[str, Any] = {
            "acc": float(result.grade.correct),
            "has_block": float(result.has_block),
            "valid": float(not result.violations),
        }
        if not validate:
            structure = annotate(response_ids, self.tags)
            rollout = fields["tool_extra_fields"]
            starts = [block.start for block in structure.blocks]
            info |= {
                "grade": result.grade.status,
                "recipe": result.recipe,
                "terms": result.terms,
                "data_source": str(fields.get("data_source", "")),
                "answer": result.grade.answer,
                "violations": result.violations,
                "paths_per_block": result.paths_per_block,
                "position": sum(starts) / len(starts) / len(response_ids) if starts else None,
                "tokens": len(response_ids),
                "critical_tokens": structure.critical_tokens,
                "truncated": float(rollout["truncated"]),
                "forced_closers": float(rollout["forced_closers"]),
                "failed_paths": float(rollout["failed_paths"]),
            }
        return {"reward_score": result.score, "reward_extra_info": info}

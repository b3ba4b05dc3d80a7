"""RL on verl's synchronous V1 trainer (``trainer_mode: parallel``): schedule, monitors, records of parallel thinking.

How it departs from textbook GRPO is configuration (``configs/rl.yaml``); this class adds no algorithm. It

- tells the reward manager which samples are for validation, which always pays accuracy;
- logs the phase of the reward, what the rollouts looked like, and how far engine and trainer disagree, every step;
- writes every rollout with its grade to ``trainer.rollout_data_dir``;
- stops when rollouts fail instead of training on padding.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import transfer_queue as tq
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from parallel_r1.config import ParallelConfig
from parallel_r1.rewards.manager import VALIDATION_KEY
from parallel_r1.rewards.schedule import scheduled
from parallel_r1.rollout.client import RolloutClient
from parallel_r1.tags import tag_ids
from parallel_r1.training.metrics import mismatch_metrics, mismatch_warning, rollout_metrics

MAX_FAILED_SHARE = 0.1  # of a step's rollouts; above it something is broken rather than unlucky


class _ValidationLoader:
    """A validation data loader whose batches say that they are for validation."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            batch[VALIDATION_KEY] = np.full(len(batch["raw_prompt"]), True, dtype=object)
            yield batch

    def __len__(self) -> int:
        return len(self.loader)


@register_trainer("parallel")
class ParallelTrainer(PPOTrainerSync):
    """verl's sync trainer with parallel thinking."""

    def _build_replay_buffer(self) -> ReplayBuffer:
        self.parallel = ParallelConfig.from_mapping(OmegaConf.to_container(self.config.parallel_r1))
        self.trainer_mode = "sync"  # verl compares this literal to choose synchronous semantics
        replay_buffer = super()._build_replay_buffer()
        replay_buffer.poll_interval = 0.1  # seconds; verl's 2 s would be half of a small model's step
        return replay_buffer

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        if self.config.trainer.device == "cpu":
            from parallel_r1.engine.cpu_workers import CPUActorRolloutRefWorker

            for role in self.role_worker_mapping:
                if role != Role.Critic:
                    self.role_worker_mapping[role] = ray.remote(CPUActorRolloutRefWorker)

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        self.val_dataloader = _ValidationLoader(self.val_dataloader)

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        self.tags = tag_ids(self.tokenizer)

    def get_llm_client(self) -> RolloutClient:
        return self.llm_server_manager.get_client(RolloutClient)

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, **kwargs: Any) -> KVBatchMeta:
        expected = self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n
        failed = expected - len(batch.keys)
        if failed > MAX_FAILED_SHARE * expected:
            raise RuntimeError(
                f"step {self.global_steps}: {failed} of {expected} rollouts failed; search this log for "
                "'Error in _run_prompt'"
            )
        metrics["rollout/failed"] = failed
        return super()._balance_batch(batch, metrics, **kwargs)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_old_log_prob(batch, metrics)
        fields = ["responses", "rollout_log_probs", "old_log_probs"]
        keys = self._real_keys(batch)
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=[*fields, "extra_fields"])
        responses, engine, trainer = ([tensor.numpy() for tensor in data[name].unbind()] for name in fields)
        sampled = [np.ones(len(ids), dtype=bool) for ids in responses]
        for mask, extra in zip(sampled, _objects(data["extra_fields"]), strict=True):
            mask[list(extra["inserted"])] = False
        found = mismatch_metrics(zip(responses, sampled, engine, trainer, strict=True), self.tags)
        metrics.update(found)
        warning = mismatch_warning(found, self.parallel.mismatch_bound)
        if warning:
            warnings.warn(f"step {self.global_steps}: {warning}", RuntimeWarning, stacklevel=2)
        metrics["mismatch/over_bound"] = float(warning is not None)
        return batch

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict, timing_raw: dict, global_steps: int, epoch: int
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        keys = self._real_keys(batch)
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["extra_fields", "rm_scores"])
        infos = [fields["reward_extra_info"] for fields in _objects(data["extra_fields"])]
        scores = [float(row.sum()) for row in data["rm_scores"].unbind()]
        metrics.update(rollout_metrics(infos, scores))
        metrics["reward/phase"] = int(scheduled(global_steps, self.parallel.reward)[1])
        ungraded, limit = metrics["grade/ungraded"], self.parallel.reward.max_ungraded
        if limit is not None and ungraded > limit:
            raise RuntimeError(
                f"step {global_steps}: {ungraded:.1%} of the responses have no answer that can be graded, more than "
                f"parallel_r1.reward.max_ungraded={limit}; look at them in {self.config.trainer.rollout_data_dir}"
            )

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict, rollout_data_dir: str) -> None:
        keys = sorted(self._real_keys(batch))
        fields = ["prompts", "responses", "rm_scores", "reward_model", "extra_fields"]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
        columns = {name: data[name].unbind() for name in ("prompts", "responses", "rm_scores")}
        lines = []
        for i, (key, reward_model, extra) in enumerate(
            zip(keys, _objects(data["reward_model"]), _objects(data["extra_fields"]), strict=True)
        ):
            row = {
                "uid": key,
                "step": self.global_steps,
                "input": self.tokenizer.decode(columns["prompts"][i], skip_special_tokens=True),
                "output": self.tokenizer.decode(columns["responses"][i], skip_special_tokens=True),
                "gts": reward_model["ground_truth"],
                "score": float(columns["rm_scores"][i].sum()),
                **extra["reward_extra_info"],
            }
            row["correct"] = bool(row.pop("acc"))
            lines.append(json.dumps(row))  # ASCII: a model may write what some readers take for the end of a line
        folder = Path(rollout_data_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.global_steps}.jsonl").write_text("\n".join(lines) + "\n")

    @staticmethod
    def _real_keys(batch: KVBatchMeta) -> list[str]:
        """Keys of ``batch`` without the copies that verl appends as padding."""
        return [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]


def _objects(column: Any) -> list[Any]:
    """A non-tensor column as plain objects; TransferQueue returns a list of objects or of tensordict wrappers."""
    return [getattr(value, "data", value) for value in list(column)]


class ParallelTaskRunner(TaskRunnerV1.__ray_metadata__.modified_class):
    """verl's task runner; importing this module in its process registers the trainer."""

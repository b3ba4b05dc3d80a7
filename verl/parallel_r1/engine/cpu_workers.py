"""verl's training workers on CPU ranks: they join a plain gloo group first.

verl asks torch for the backend ``cpu:gloo,cpu:gloo`` there, which torch rejects; a group that exists is left alone.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker


def init_gloo() -> None:
    """Join the default process group that the environment (RANK, WORLD_SIZE, MASTER_*) describes."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
        )


class CPUTrainingWorker(TrainingWorker):
    def __init__(self, *args: Any, **kwargs: Any):
        init_gloo()
        super().__init__(*args, **kwargs)


class CPUActorRolloutRefWorker(ActorRolloutRefWorker):
    actor_worker_cls = CPUTrainingWorker
    ref_worker_cls = CPUTrainingWorker

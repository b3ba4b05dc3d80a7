"""Environment variables that verl, vLLM and Ray need before they are imported."""

from __future__ import annotations

import os

CPU = {
    "VERL_PLATFORM": "cpu",
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),  # trainer and engine take turns, so each may use all cores
    "OMP_WAIT_POLICY": "passive",  # idle threads sleep instead of spinning on cores that others need
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # with the "uni" executor: no worker process beside the engine's
}
ALWAYS = {
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # A worker that exits would kill Python's resource tracker, which then cannot remove the worker's semaphores.
    "RAY_kill_child_processes_on_worker_exit": "0",
    "HYDRA_FULL_ERROR": "1",
}


def prepare(device: str) -> None:
    """Set the defaults for ``device`` ("cpu" or "cuda"); a variable that the user has set wins."""
    for name, value in {**ALWAYS, **(CPU if device == "cpu" else {})}.items():
        os.environ.setdefault(name, value)

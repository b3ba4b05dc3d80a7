"""Cold-start SFT with verl's SFT trainer: ``python -m parallel_r1.training.sft quickstart_sft [key=value …]``.

One process trains on one device; under ``torchrun`` every rank joins through the usual environment variables.
"""

from __future__ import annotations

import os
import socket

from parallel_r1 import environment
from parallel_r1.training.compose import from_command_line


def _init_process_group(device: str) -> None:
    """verl asks torch for ``cpu:gloo,cpu:gloo`` on a CPU, which torch rejects; a group that exists is left alone."""
    import torch

    if device != "cpu":
        from verl.utils.distributed import initialize_global_process_group

        initialize_global_process_group()
        return
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo")


def main() -> None:
    config = from_command_line()
    environment.prepare(config.trainer.device)
    import torch
    from verl.trainer.sft_trainer import SFTTrainer

    _init_process_group(config.trainer.device)
    try:
        SFTTrainer(config=config).fit()
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

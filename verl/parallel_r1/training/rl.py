"""RL with verl's V1 trainer: ``python -m parallel_r1.training.rl quickstart_rl [key=value …]``."""

from __future__ import annotations

import sys

from parallel_r1 import environment
from parallel_r1.training import fidelity, gold
from parallel_r1.training.compose import from_command_line


def main() -> None:
    config = from_command_line()
    environment.prepare(config.trainer.device)
    try:
        parallel = fidelity.parallel_config(config)
        fidelity.apply_to_engine(config, parallel)
        gold.check(config, parallel.reward.grader)
    except ValueError as error:
        sys.exit(f"parallel_r1.training.rl: {error}")

    import ray
    from verl.trainer.main_ppo import run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.device import auto_set_device

    from parallel_r1.training.trainer import ParallelTaskRunner

    auto_set_device(config)
    validate_config(
        config=config,
        use_reference_policy=need_reference_policy(config),
        use_critic=need_critic(config),
    )
    try:
        run_ppo(config, task_runner_class=ray.remote(ParallelTaskRunner))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()

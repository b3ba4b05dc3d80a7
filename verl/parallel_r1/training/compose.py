"""Compose a training configuration: a file of ``configs/`` on top of verl's own, plus Hydra overrides."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from parallel_r1.training import fidelity

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


class ConfigError(ValueError):
    """A configuration that cannot be composed; the message is one line."""


def compose(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """``configs/<name>.yaml`` with ``overrides`` (Hydra's ``key=value``).

    Raises:
        ConfigError: unknown file or key, or a value that ``parallel_r1`` refuses.
    """
    if not (CONFIGS / f"{name}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"no configuration {name!r} in {CONFIGS}; there are {known}")
    os.environ.setdefault("PARALLEL_R1_ROOT", str(CONFIGS.parent))  # configurations name files of the repository by it
    try:
        with initialize_config_dir(str(CONFIGS), version_base=None, job_name="parallel_r1"):
            config = hydra_compose(name, ["hydra.searchpath=[pkg://verl.trainer.config]", *overrides])
        if "parallel_r1" in config:
            fidelity.apply(config)
        if "actor_rollout_ref" in config:
            _check_rollout(config)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"configuration {name!r} with {list(overrides)}: {reason}") from error
    return config


def _check_rollout(config: DictConfig) -> None:
    """Rollout settings under which an engine would fail late, or log-probabilities would be wrong.

    Raises:
        ValueError: with the key and the remedy.
    """
    rollout = config.actor_rollout_ref.rollout
    if rollout.logprobs_mode == "raw_logprobs" and rollout.temperature != 1.0:
        raise ValueError(
            f"actor_rollout_ref.rollout.temperature is {rollout.temperature}, but raw_logprobs are those of "
            "temperature 1; set actor_rollout_ref.rollout.logprobs_mode=processed_logprobs"
        )
    if rollout.full_determinism:
        raise ValueError(
            "actor_rollout_ref.rollout.full_determinism gives all paths of a rollout one request id, and vLLM "
            "refuses the second; set it to false"
        )
    seeded, room = config.parallel_r1.rollout.seed is not None, rollout.max_num_seqs * (rollout.max_model_len or 0)
    if seeded and config.trainer.device == "cpu" and rollout.max_num_batched_tokens < room:
        raise ValueError(
            f"parallel_r1.rollout.seed is set, and vLLM's CPU engine fails on a seeded request that it prefills in "
            f"parts; set actor_rollout_ref.rollout.max_num_batched_tokens={room} (max_num_seqs * max_model_len)"
        )


def from_command_line() -> DictConfig:
    """What ``python -m parallel_r1.training.… NAME [key=value …]`` asks for; an error is one line and exit code 2."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        sys.exit(f"usage: python -m {_module()} CONFIG [key=value ...]   (CONFIG: a file of {CONFIGS}, without .yaml)")
    try:
        config = compose(arguments[0], arguments[1:])
        _check_paths(config)
        return config
    except ConfigError as error:
        print(f"{_module()}: {error}", file=sys.stderr)
        sys.exit(2)


def _check_paths(config: DictConfig) -> None:
    """A path on this machine that is not there costs minutes when a worker finds out; a hub id is left to the hub.

    Raises:
        ConfigError: the model folder or a data file does not exist.
    """
    keys = ("model.path", "actor_rollout_ref.model.path", "data.train_files", "data.val_files")
    for key in keys:
        value = OmegaConf.select(config, key)
        for path in [value] if isinstance(value, str) else value or []:
            if path.startswith(("/", ".", "~")) and not Path(path).expanduser().exists():
                raise ConfigError(f"{key}: there is nothing at {path}; check the path, or set {key}=…")


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).name

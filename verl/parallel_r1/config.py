"""The keys below ``parallel_r1:`` in every training configuration; an unknown key fails.

verl's own keys stay where verl has them. Only what parallel thinking adds is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class RolloutConfig:
    """Fork/join limits. Token budgets go to the engine before generation.

    Attributes:
        num_paths: paths per block.
        max_blocks: after this many blocks the model cannot open another one and goes on to its answer.
        max_path_tokens: budget of one path, its ``</Path>`` included.
        max_summary_tokens: budget of one summary, its ``</Summary>`` included.
        join_text: what stands between ``</Parallel>`` and ``<Summary>``.
    """

    num_paths: int = 2
    max_blocks: int = 4
    max_path_tokens: int = 512
    max_summary_tokens: int = 256
    join_text: str = "\n"

    def __post_init__(self) -> None:
        for name in ("num_paths", "max_path_tokens", "max_summary_tokens"):
            _at_least(self, name, 1)
        _at_least(self, "max_blocks", 0)


@dataclass(frozen=True)
class RewardConfig:
    """S2 and the mid-training switch; see :mod:`parallel_r1.rewards.schedule`.

    Attributes:
        window: steps of one alternation window.
        accuracy_steps: leading steps of a window that pay accuracy; the rest pays the parallel reward.
        switch_step: first step that pays accuracy only, for good; None never switches.
    """

    window: int = 10
    accuracy_steps: int = 8
    switch_step: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, "window", 1)
        _at_least(self, "accuracy_steps", 0)
        if self.accuracy_steps > self.window:
            raise ValueError(
                f"parallel_r1.reward.accuracy_steps is {self.accuracy_steps}, more than the window of {self.window} "
                "steps; make it smaller"
            )
        if self.switch_step is not None:
            _at_least(self, "switch_step", 1)


@dataclass(frozen=True)
class ParallelConfig:
    """Everything below ``parallel_r1:``."""

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any] | None) -> ParallelConfig:
        """Build from a plain or OmegaConf mapping.

        Raises:
            ValueError: unknown key, wrong type or a value out of range, with the key's full name.
        """
        return _build(cls, values or {}, "parallel_r1")


def _at_least(config: Any, name: str, minimum: int) -> None:
    value = getattr(config, name)
    if value < minimum:
        raise ValueError(f"parallel_r1: {name} is {value}; it must be at least {minimum}")


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    known = {item.name: item for item in fields(cls)}
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise ValueError(f"unknown key {where}.{unknown[0]}; known keys are {', '.join(sorted(known))}")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        default = known[name].default_factory() if callable(known[name].default_factory) else known[name].default
        if is_dataclass(default):
            arguments[name] = _build(type(default), value or {}, f"{where}.{name}")
        elif value is None and "None" in str(known[name].type):
            arguments[name] = None
        else:
            expected = str if isinstance(default, str) else int
            if not isinstance(value, expected) or isinstance(value, bool):
                raise ValueError(f"{where}.{name} is {value!r}; expected {expected.__name__}")
            arguments[name] = value
    return cls(**arguments)

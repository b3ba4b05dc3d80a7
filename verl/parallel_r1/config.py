"""The keys below ``parallel_r1:`` in every training configuration; an unknown key fails.

verl's own keys stay where verl has them. Only what parallel thinking adds is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

ATTENTION = "parallel_r1"  # value of a model's ``attn_implementation`` (parallel_r1.attention)
STRUCTURE_KEY = "parallel_r1_structure"  # key of a model's configuration, saved with checkpoints (parallel_r1.engine)

Positive = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0)]
TopP = Annotated[float, Field(gt=0, le=1)]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RolloutConfig(_Config):
    """How a response forks and joins. Token budgets go to the engine before generation.

    Attributes:
        mode: "forked" decodes the paths of a block as concurrent requests that do not see each other; "sequential"
            lets the model write blocks itself, causally, in one request.
        num_paths: paths per block, or ``[least, most]`` to draw from for every block.
        max_blocks: after this many blocks the model cannot open another one.
        stop_after_blocks: end the response there, without an answer, as the published code does; otherwise the model
            goes on to its answer.
        max_path_tokens: budget of one path, its ``</Path>`` included.
        max_summary_tokens: budget of one summary, its ``</Summary>`` included.
        max_block_tokens: budget of all paths of a block together; None: no limit of its own.
        max_critical_tokens: budget of the response's critical path (the longest path of each block counts); None: no
            limit of its own. ``data.max_response_length`` always limits the sum of all tokens.
        join_text: what stands between ``</Parallel>`` and ``<Summary>``.
        path_temperature, path_top_p: for all paths, or a list that paths take turns in; None: as elsewhere.
        seed: with a seed, every request has its own, made from this one and its place (step, sample, block, path);
            None: unseeded.
    """

    mode: Literal["forked", "sequential"] = "forked"
    num_paths: Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)] = 2
    max_blocks: Annotated[int, Field(ge=0)] = 4
    stop_after_blocks: bool = False
    max_path_tokens: Positive = 512
    max_summary_tokens: Positive = 256
    max_block_tokens: Positive | None = None
    max_critical_tokens: Positive | None = None
    join_text: str = "\n"
    path_temperature: Temperature | Annotated[list[Temperature], Field(min_length=1)] | None = None
    path_top_p: TopP | Annotated[list[TopP], Field(min_length=1)] | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _range_is_ordered(self) -> RolloutConfig:
        if isinstance(self.num_paths, list) and self.num_paths[0] > self.num_paths[1]:
            raise ValueError(f"num_paths is {self.num_paths}; the first number is the least")
        return self


class RewardConfig(_Config):
    """Which reward is paid when; see :mod:`parallel_r1.rewards.schedule`.

    Attributes:
        recipe: a file of ``configs/rewards``, without ``.yaml``; it may alternate by itself.
        switch_step: first step that pays ``switch_recipe``, for good; None never switches.
        switch_recipe: see there.
        grader: "robust" or "reference"; None: the one that goes with ``fidelity``.
        max_ungraded: share of a step's responses with status unparseable, timeout or error above which the run stops;
            None never stops.
    """

    recipe: str = "accuracy_parallel_interv"
    switch_step: Positive | None = None
    switch_recipe: str = "accuracy"
    grader: Literal["robust", "reference"] | None = None
    max_ungraded: Annotated[float, Field(ge=0, le=1)] | None = None


class ParallelConfig(_Config):
    """Everything below ``parallel_r1:``.

    Attributes:
        variant: "seen" trains with causal attention; "unseen" hides sibling paths from each other, which share
            positions.
        fidelity: "exact" (ours) or "paper"; see :mod:`parallel_r1.training.fidelity`.
        mismatch_bound: nats; a step whose mean |engine - trainer| log-probability exceeds it in any region is warned
            about.
    """

    variant: Literal["seen", "unseen"] = "unseen"
    fidelity: Literal["exact", "paper"] = "exact"
    mismatch_bound: Annotated[float, Field(gt=0)] = 0.05
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any] | None) -> ParallelConfig:
        """Build from a plain mapping.

        Raises:
            ValueError: unknown key, wrong type or a value out of range, with the key's full name; one line.
        """
        try:
            return cls.model_validate(dict(values or {}))
        except ValidationError as error:
            raise ValueError(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    """The first thing wrong, in one line."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"] if isinstance(part, str) and part.isidentifier()]
    where = ".".join(["parallel_r1", *path])
    if first["type"] == "extra_forbidden":
        model: type[BaseModel] = ParallelConfig
        for part in path[:-1]:
            model = model.model_fields[part].annotation
        return f"unknown key {where}; known keys are {', '.join(sorted(model.model_fields))}"
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}"
    expected = {"less_than_equal": "at most {le}", "greater_than_equal": "at least {ge}", "greater_than": "above {gt}"}
    rule = expected.get(first["type"])
    wanted = f"it must be {rule.format(**first['ctx'])}" if rule else first["msg"][0].lower() + first["msg"][1:]
    return f"{where} is {first['input']!r}; {wanted}"

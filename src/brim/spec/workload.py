"""The job: model, data, recipe, batch, devices. What is given; the planner never changes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from brim.spec.data import DataProfile
from brim.spec.device import Cluster
from brim.spec.model import STRICT, ModelShape
from brim.spec.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTarget:
    """The effective batch to keep: sequences one optimizer step averages over."""

    __pydantic_config__ = STRICT

    sequences: int
    """Effective batch size, sequences."""
    tokens: int
    """The same in tokens at the planned length."""
    low: int
    """Low end of the task's optimal range, sequences."""
    high: int
    """High end of the task's optimal range, sequences."""
    min_useful: int
    """Below this the task's gradient is mostly noise, sequences."""
    max_useful: int
    """Above this the task gains nothing, sequences."""
    reason: str
    """Where the number comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Facts of the job, and everything that changes its result."""

    __pydantic_config__ = STRICT

    model: ModelShape
    """The model."""
    data: DataProfile
    """The data."""
    recipe: Recipe
    """How it is trained."""
    batch: BatchTarget
    """The effective batch."""
    cluster: Cluster
    """The devices."""
    task: str
    """Key of the tasks table."""
    moe_imbalance: float = 1.0
    """Tokens of the busiest expert as a multiple of an even share; 1.0 is balanced routing."""
    num_epochs: float = 1.0
    """Passes over the data."""
    objective: Literal["step_seconds"] = "step_seconds"
    """What the planner minimises."""


def with_seq_len(workload: Workload, seq_len: int) -> Workload:
    """Return the workload at another length, with the same effective batch in sequences."""
    return replace(
        workload, data=replace(workload.data, seq_len=seq_len),
        batch=replace(workload.batch, tokens=workload.batch.sequences * seq_len),
    )  # fmt: skip

"""What a run was measured to cost, beside what had been predicted: the facts that history keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brim.spec.model import STRICT
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What an answerer had said of the run, to be held against what was measured."""

    __pydantic_config__ = STRICT

    source: Literal["rule", "formula", "trace", "trial"]
    """Who answered."""
    peak_allocated_bytes: int
    """Most bytes the allocator would hand out at once."""
    peak_reserved_bytes: int
    """Most bytes the allocator would hold."""
    device_bytes: int
    """What the driver's tool would show."""
    step_seconds: float | None = None
    """One optimizer step; None where the speed of the device is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A run that was measured: a trial's few steps, or a training run that was watched."""

    __pydantic_config__ = STRICT

    kind: Literal["trial", "watch"]
    """Who measured."""
    workload: Workload
    """The job."""
    strategy: Strategy
    """How it was run."""
    finished: str
    """When, UTC, ISO 8601 to the second."""
    device: str
    """Name that the driver gives the card, or `cpu` of a capped one."""
    capacity_bytes: int
    """Memory of the card, bytes."""
    driver: str | None = None
    """Release of the driver; None where there is none."""
    versions: tuple[tuple[str, str], ...] = ()
    """Package and release of what took part."""
    num_ranks: int = 1
    """Ranks; the figures are those of the worst."""
    num_steps: int
    """Optimizer steps that were measured."""
    fits: bool
    """Whether the run kept within the card: no out-of-memory, no retry of the allocator, no spill to the host."""
    problem: str = ""
    """Why it does not fit; empty if it does."""
    peak_allocated_bytes: int | None = None
    """Most bytes the allocator handed out at once; None if the run died before that was known."""
    peak_reserved_bytes: int | None = None
    """Most bytes the allocator held."""
    device_bytes: int | None = None
    """Most bytes in use on the card, all programs."""
    num_retries: int = 0
    """Times the allocator emptied its pool to go on."""
    fixed_seconds: float | None = None
    """Cost paid once per optimizer step; None if it was not told apart."""
    micro_batch_seconds: float | None = None
    """Cost of one micro-batch, forward and backward."""
    step_seconds: float | None = None
    """One optimizer step of the strategy."""
    tokens_per_second: float | None = None
    """Real tokens, padding left out, per second and device."""
    longest_tokens: int | None = None
    """Tokens of the longest sequence that was run."""
    predicted: Prediction | None = None
    """What had been predicted; None if nobody had."""

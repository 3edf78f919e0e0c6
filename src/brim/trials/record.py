"""What a trial found: every run, the choice, and the curve of memory against speed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from brim.planner.record import Plan
from brim.spec.model import STRICT
from brim.spec.observation import Observation
from brim.spec.strategy import Strategy

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A strategy as memory and speed: measured where it was run, else what runs of its kin say of it."""

    __pydantic_config__ = STRICT

    strategy: Strategy
    """The strategy."""
    peak_bytes: int
    """Allocated peak, bytes."""
    tokens_per_second: float
    """Real tokens per second and device."""
    measured: bool
    """Whether it was run."""
    fits: bool
    """Whether it keeps within the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Strategies of a job that were run for a few real optimizer steps on a device."""

    __pydantic_config__ = STRICT

    runs: tuple[Observation, ...]
    """Every run, in order."""
    best: Observation | None
    """The fastest that fits; None if nothing that was run does."""
    plan: Plan | None
    """The job with that strategy, measured; None without one."""
    reason: str
    """Why the search ended."""
    points: tuple[Point, ...]
    """Candidates as memory and speed, the lightest first; empty where nothing was measured to compare with."""
    budget_bytes: int
    """Bytes that tensors may take on the device."""
    notes: tuple[str, ...] = ()
    """What was assumed, one sentence each."""
    schema_version: int = SCHEMA_VERSION
    """Version of this record."""

    @property
    def frontier(self) -> tuple[Point, ...]:
        """Points that fit and are faster than every lighter one."""
        return find_frontier(self.points)

    @property
    def num_ooms(self) -> int:
        """Runs that ran out of memory or died."""
        return sum(run.peak_allocated_bytes is None for run in self.runs)


def find_frontier(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return the points that fit and are faster than every lighter one: no other is better in both."""
    fastest, found = 0.0, []
    for point in sorted(points, key=lambda one: (one.peak_bytes, -one.tokens_per_second)):
        if point.fits and point.tokens_per_second > fastest:
            fastest = point.tokens_per_second
            found.append(point)
    return tuple(found)


def describe_trial(trial: Trial) -> dict[str, Any]:
    """Return a trial as a JSON object; its plan as `brim plan --json` prints it."""
    from brim.planner.document import describe_plan

    document = asdict(trial)
    document["plan"] = describe_plan(trial.plan) if trial.plan is not None else None
    return document

"""The plan: what was given, what was chosen, why, and what else was possible."""

from __future__ import annotations

from dataclasses import dataclass

from brim.cost.ledger import Estimate
from brim.spec.model import STRICT
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanWarning:
    """Something the user should know; never a reason to refuse."""

    __pydantic_config__ = STRICT

    code: str
    """Stable short name, for example `few_steps`."""
    text: str
    """One sentence with the numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A strategy that was not chosen."""

    __pydantic_config__ = STRICT

    strategy: Strategy
    """The strategy."""
    over_bytes: int
    """Bytes above the budget; 0 when it fits but is slower."""
    reason: str
    """Why not."""
    peak_allocated_bytes: int
    """Its predicted peak, bytes."""
    relative_step_time: float | None = None
    """Its step time over the chosen one's; None if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """A change of the workload that would make it fit, or fit better; never applied silently."""

    __pydantic_config__ = STRICT

    change: str
    """What to change, as the user would type it."""
    effect: str
    """What it costs or changes in the training result."""
    peak_allocated_bytes: int
    """Predicted peak after the change, bytes."""
    fits: bool
    """Whether it then fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The run in optimizer steps."""

    __pydantic_config__ = STRICT

    num_sequences: int | None
    """Sequences in one epoch; None if unknown."""
    steps_per_epoch: int | None
    """Optimizer steps in one epoch; None if unknown."""
    total_steps: int | None
    """Optimizer steps in the run; None if unknown."""
    warmup_steps: int | None
    """Steps of linear warmup; None if unknown."""
    sequences_per_step: int
    """Effective batch, sequences."""
    tokens_per_step: int
    """Effective batch, tokens at the planned length."""
    epoch_seconds: float | None
    """Time of one epoch, seconds; None if unknown."""
    note: str
    """What counts as a step in the trainer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The record every later stage reads."""

    __pydantic_config__ = STRICT

    workload: Workload
    """What was given."""
    strategy: Strategy
    """What was chosen."""
    estimate: Estimate
    """What the choice costs."""
    effective_batch_size: int
    """Micro-batch x accumulation x data-parallel ranks, sequences."""
    effective_batch_tokens: int
    """The same in tokens at the planned length."""
    budget_bytes: int
    """Bytes the plan may use: 90 % of what is usable, less the answerer's margin."""
    capacity_bytes: int
    """Bytes there are (free ones, where the device is in this machine)."""
    reasons: tuple[str, ...]
    """Why this strategy: what limits, what was preferred."""
    assumptions: tuple[str, ...]
    """Defaults that were filled in, one sentence each."""
    warnings: tuple[PlanWarning, ...]
    """What the user should know."""
    schedule: Schedule
    """The run in optimizer steps."""
    rejected: tuple[Rejected, ...]
    """Alternatives, nearest first."""
    num_candidates: int = 0
    """Strategies that were costed."""
    schema_version: int = SCHEMA_VERSION
    """Version of this record."""
    brim_version: str = ""
    """Version that wrote it."""

    def _repr_html_(self) -> str:
        """Return the plan as HTML, for notebooks."""
        from brim.report.html import format_plan_html  # report sits above; asked on first display only

        return format_plan_html(self)

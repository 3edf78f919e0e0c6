"""What the proofs say: of accumulation, and of a strategy's neutrality."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SMALL = "a small copy of the model class, dropout off"
FULL = "the trainer's own model, dropout off"
FP32_LIMIT = 1e-5
"""Relative error above which fp32 accumulation is not exact; splits of one batch agree to 5e-7 (noise floor)."""
BF16_NORM_LIMIT, BF16_ANGLE_LIMIT = 2e-3, 3e-4
"""Limits in bf16 for |norm ratio - 1| and 1 - cosine: four to five times the worst difference measured between exact
splits. Source: docs/exactness.md, tolerances."""

BF16_NOISE = 3e-2
"""Relative difference of two bf16 gradients of one batch (measured: at most 1.1e-2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitResult:
    """One optimizer step of one way to split the batch."""

    micro_batch_size: int
    """Sequences per rank per forward."""
    gradient_accumulation_steps: int
    """Micro-batches that the loop was told to accumulate."""
    num_ranks: int
    """Data-parallel ranks."""
    window: int
    """Which optimizer step, from 0; the last one is partial."""
    num_micro_batches: int
    """Micro-batches that it really had, all ranks together."""
    error: float
    """Norm of the difference to the truth over the norm of the truth."""
    norm_ratio: float
    """Norm of the gradient over the norm of the truth."""
    cosine: float
    """Cosine of the angle between the two."""
    cause: str = ""
    """What is wrong; empty if nothing is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccumulationReport:
    """Whether accumulating micro-batches gives the big batch's gradient, and what is wrong where it does not."""

    subject: str
    """Model class and what trains it."""
    loss: str
    """What the loss averages over, as measured."""
    precision: str
    """`fp32` or `bf16`."""
    size: str = SMALL
    """What stood for the user's model."""
    splits: tuple[SplitResult, ...]
    """Each split of the batch, window by window."""
    padding_error: float = 0.0
    """How far the padded big batch is from its sequences run alone: not accumulation."""
    batch_error: float = 0.0
    """How far the one-batch gradient is from what micro-batches define, where an auxiliary loss is not linear."""
    causes: tuple[str, ...] = ()
    """The named causes, each once, the first split's first."""
    fix: str = ""
    """The line that makes it exact; empty if it is."""
    versions: dict[str, str] = field(default_factory=dict)
    """Packages that ran."""

    @property
    def exact(self) -> bool:
        """Whether every split is within the limits of its precision."""
        return not self.causes

    @property
    def worst(self) -> SplitResult:
        """The split that is furthest from the truth."""
        return max(self.splits, key=lambda split: split.error)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: verdict, drawing and table of the error by split."""
        from brim.report.exactness import format_accumulation_html

        return format_accumulation_html(self)

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> AccumulationReport:
        """Return the report that `describe` wrote."""
        values = {key: value for key, value in document.items() if key != "exact"}
        splits = tuple(SplitResult(**split) for split in values.pop("splits"))
        return cls(splits=splits, causes=tuple(values.pop("causes")), **values)

    def describe(self) -> dict[str, Any]:
        """Return the report as JSON-able values, `exact` among them."""
        return {"exact": self.exact, **asdict(self)}


Verdict = Literal["neutral", "belongs to the workload", "not checked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnobResult:
    """One knob of a strategy, turned."""

    knob: str
    """Field of the strategy, `sharding`, or `together` for all that are neutral alone."""
    value: str
    """What it is turned to."""
    verdict: Verdict
    """`neutral`; `belongs to the workload`, since it changes the training result; or `not checked`."""
    error: float | None = None
    """Norm of the difference to the plain run over the norm of the plain run; None if not checked."""
    norm_ratio: float | None = None
    """Norm over the plain run's."""
    cosine: float | None = None
    """Cosine of the angle to the plain run's."""
    reason: str = ""
    """Why it was not checked or what is wrong, or what ran in its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeutralityReport:
    """Whether the knobs of a strategy leave the training result as it is."""

    subject: str
    """Model class."""
    precision: str
    """`fp32`."""
    knobs: tuple[KnobResult, ...]
    """Each knob that is turned, then all together."""
    versions: dict[str, str] = field(default_factory=dict)
    """Packages that ran."""

    @property
    def neutral(self) -> bool:
        """Whether no knob that could be checked changes the result."""
        return all(knob.verdict != "belongs to the workload" for knob in self.knobs)

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> NeutralityReport:
        """Return the report that `describe` wrote."""
        values = {key: value for key, value in document.items() if key != "neutral"}
        return cls(knobs=tuple(KnobResult(**knob) for knob in values.pop("knobs")), **values)

    def describe(self) -> dict[str, Any]:
        """Return the report as JSON-able values, `neutral` among them."""
        return {"neutral": self.neutral, **asdict(self)}


def is_exact(error: float, norm_ratio: float, cosine: float, precision: str) -> bool:
    """Return whether a gradient is the truth within the limits of a precision."""
    if precision == "fp32":
        return error <= FP32_LIMIT
    return abs(norm_ratio - 1) <= BF16_NORM_LIMIT and 1 - cosine <= BF16_ANGLE_LIMIT


def without_numbers(cause: str) -> str:
    """Return the name of a cause without what differs between splits."""
    return re.sub(r" \((?:gradient )?x [^)]*\)", "", cause)

"""Exact search: cost every candidate that could fit, keep the fastest; results equal brute force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from brim.errors import ProbeFailed
from brim.planner.answerer import Answerer
from brim.planner.batch import is_power_of_two
from brim.planner.candidates import Fixed, Variant, list_splits, list_variants
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

TIE_FRACTION = 0.03
"""Step times closer than this are equal: the time law is not better than that."""
SLOWER_TEXT = "slower at every micro-batch than what fits already"
"""Why a variant was not asked for, where each answer takes seconds."""
_RECOMPUTATION = {"none": 0, "selective": 1, "full": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Costed:
    """A strategy with its peak and its time."""

    strategy: Strategy
    """The strategy."""
    peak_bytes: int
    """Predicted allocated peak, bytes."""
    seconds: float | None
    """Predicted step time, seconds; None if the device's speed is unknown."""
    cost: float
    """What is minimised: seconds, or the relative cost that stands in for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The outcome of a search."""

    best: Costed | None
    """The choice; None when nothing fits."""
    fitting: tuple[Costed, ...]
    """Every strategy that fits, in order of enumeration."""
    over: tuple[Costed, ...]
    """For each variant the smallest strategies that do not fit."""
    budget_bytes: int
    """The bytes they had to fit into."""
    left_out: tuple[tuple[Strategy, str], ...] = ()
    """Knobs (with the split 1 x 1) that were not asked for, and why."""

    @property
    def num_costed(self) -> int:
        """Strategies whose peak was asked for."""
        return len(self.fitting) + len(self.over)

    @property
    def smallest(self) -> Costed:
        """The strategy with the lowest peak."""
        return min((*self.fitting, *self.over), key=lambda costed: costed.peak_bytes)


def search(workload: Workload, fixed: Fixed, answerer: Answerer, budget_bytes: int) -> Found:
    """Return the fastest strategy that fits, and what was costed on the way.

    A larger micro-batch never needs less memory at the same accumulation regime, so each variant is walked
    upwards to its first strategy over budget. Accumulation 1 is a regime of its own (gradients need not stay
    through the forward pass) and is always asked.

    Args:
        workload: the job.
        fixed: Strategy fields that stay as they are.
        answerer: who is asked.
        budget_bytes: bytes the allocated peak may reach.

    Raises:
        InvalidStrategy: rules forbid every candidate. ProbeFailed: none of them can be traced.
    """
    splits = list_splits(workload, fixed)
    fitting: list[Costed] = []
    over: list[Costed] = []
    left_out: list[tuple[Strategy, str]] = []
    failed: ProbeFailed | None = None
    for variant in list_variants(workload, fixed):
        if answerer.is_dear(workload) and _cannot_win(workload, variant, splits, choose(fitting), answerer):
            left_out.append((variant.at(1, 1), SLOWER_TEXT))
            continue
        try:
            fits, not_fits = _walk(workload, variant, splits, answerer, budget_bytes)
        except ProbeFailed as error:  # the other variants may run: not every model can be checkpointed
            failed = failed or error
            left_out.append((variant.at(1, 1), str(error)))
            continue
        fitting += fits
        over += not_fits
    if failed is not None and not fitting and not over:
        raise failed
    return Found(
        best=choose(fitting), fitting=tuple(fitting), over=tuple(over), budget_bytes=budget_bytes,
        left_out=tuple(left_out),
    )  # fmt: skip


def _walk(
    workload: Workload, variant: Variant, splits: Sequence[tuple[int, int]], answerer: Answerer, budget_bytes: int
) -> tuple[list[Costed], list[Costed]]:
    """Return what fits of a variant, and what was found not to."""
    fitting: list[Costed] = []
    over: list[Costed] = []
    full = False
    for micro, steps in splits:
        if full and steps > 1:
            continue
        strategy = variant.at(micro, steps)
        peak = answerer.peak(workload, strategy)
        full = peak > budget_bytes
        (over if full else fitting).append(cost_strategy(workload, strategy, peak, answerer))
    return fitting, over


def _cannot_win(
    workload: Workload, variant: Variant, splits: Sequence[tuple[int, int]], best: Costed | None, answerer: Answerer
) -> bool:
    """Whether a variant costs more than what fits already, whatever of it would fit: no split of it is in a tie."""
    if best is None:
        return False
    costs = (cost_strategy(workload, variant.at(*split), 0, answerer).cost for split in splits)
    return min(costs) > best.cost * (1 + TIE_FRACTION)


def least_peak_bytes(workload: Workload, fixed: Fixed, answerer: Answerer) -> int:
    """Return the lowest peak of any candidate, bytes: the question of `search`, without asking for the fastest.

    It lies at the smallest micro-batch or at accumulation 1, see `search`, and where most is recomputed.

    Leaves out: models of so few layers that checkpointing saves less than the one layer input it keeps.

    Raises:
        InvalidStrategy: rules forbid every candidate.
    """
    splits = list_splits(workload, fixed)
    ends = {splits[0], splits[-1]}
    variants = list_variants(workload, fixed)
    most = max(_recomputation(variant) for variant in variants)
    lightest = [variant for variant in variants if _recomputation(variant) == most]
    return min(answerer.peak(workload, variant.at(*split)) for variant in lightest for split in ends)


def _recomputation(variant: Variant) -> int:
    return _RECOMPUTATION[variant.knobs["activation_checkpointing"]]


def cost_strategy(workload: Workload, strategy: Strategy, peak_bytes: int, answerer: Answerer) -> Costed:
    """Return a strategy with its time, or with the relative cost that ranks it where the device's speed is unknown."""
    seconds = answerer.seconds(workload, strategy)
    cost = answerer.order(workload, strategy) if seconds is None else seconds
    return Costed(strategy=strategy, peak_bytes=peak_bytes, seconds=seconds, cost=cost)


def choose(fitting: Sequence[Costed]) -> Costed | None:
    """Return the fastest; among those within 3 % of it less recomputation, then the lower peak, then a
    power-of-two micro-batch, then the larger one. None if there is none.
    """
    if not fitting:
        return None
    fastest = min(costed.cost for costed in fitting)
    return min((costed for costed in fitting if costed.cost <= fastest * (1 + TIE_FRACTION)), key=_preference)


def _preference(costed: Costed) -> tuple[int, bool, int, bool, int]:
    strategy = costed.strategy
    return (
        _RECOMPUTATION[strategy.activation_checkpointing], strategy.activation_offload, costed.peak_bytes,
        not is_power_of_two(strategy.micro_batch_size), -strategy.micro_batch_size,
    )  # fmt: skip

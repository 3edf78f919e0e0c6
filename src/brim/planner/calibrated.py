"""An answerer corrected by measured runs: its figures, its margin, and the sentence that says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

from brim.cost.calibration import calibrated_margin_fraction
from brim.cost.correction import Calibration, Correction
from brim.cost.ledger import Estimate, Ledger, Moment, StepTime
from brim.cost.overhead import context_bytes
from brim.planner.answerer import Answerer, Peak
from brim.planner.budget import Budget, find_budget
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

_COUNTED = ("activations", "temporaries", "overhead")
"""Rows that a correction falls on, as long as they can bear it: weights and states are known to the byte."""


def calibrated(answerer: Answerer, calibration: Calibration, certain: Peak = lambda workload, strategy: 0) -> Answerer:
    """Return the answerer with its peak and time as measured runs of this card, trainer and family correct them.

    Questions about any other card, trainer or family, such as relaxations ask, are answered as before. The margin is
    that of the corrected figure on runs that were held out.

    Args:
        answerer: the formula.
        calibration: what measured runs said of it.
        certain: what a peak cannot be below, bytes, whatever was measured.
    """
    seconds = calibration.seconds

    def peak(workload: Workload, strategy: Strategy) -> int:
        peak_bytes = answerer.peak(workload, strategy)
        if not is_meant(workload, calibration):
            return peak_bytes
        return correct_peak(peak_bytes, calibration, certain(workload, strategy))

    def step(workload: Workload, strategy: Strategy) -> float | None:
        said = answerer.seconds(workload, strategy)
        return said if said is None or not seconds or not is_meant(workload, calibration) else said * seconds.factor

    def estimate(workload: Workload, strategy: Strategy) -> Estimate:
        said = answerer.estimate(workload, strategy)
        if not is_meant(workload, calibration):
            return said
        return correct(workload, said, calibration, certain(workload, strategy))

    return replace(
        answerer, peak=peak, seconds=step, estimate=estimate, budget=_budget(answerer.budget, calibration),
        speed_source=answerer.speed_source if seconds is None else describe_calibrated_speed(seconds),
        basis=(*answerer.basis, describe_calibration(calibration)),
    )  # fmt: skip


def is_meant(workload: Workload, calibration: Calibration) -> bool:
    """Return whether a workload runs on the card, in the trainer and with a model of the family of a calibration."""
    return (
        workload.cluster.device.name == calibration.device
        and workload.recipe.engine.name == calibration.trainer
        and workload.model.model_type == calibration.model_type
    )


def correct_peak(peak_bytes: int, calibration: Calibration, certain_bytes: int = 0) -> int:
    """Return a predicted peak corrected, bytes; never below what is certain, unless it was below already."""
    return max(calibration.allocated.scale(peak_bytes), min(peak_bytes, certain_bytes))


def correct(workload: Workload, estimate: Estimate, calibration: Calibration, certain_bytes: int = 0) -> Estimate:
    """Return an estimate of a workload corrected; moments and ledgers still add up."""
    peak = correct_peak(estimate.peak_allocated_bytes, calibration, certain_bytes)
    highest = estimate.peak_moment
    moments = tuple(
        _correct_moment(one, peak if one.name == highest else calibration.allocated.scale(one.total_bytes))
        for one in estimate.moments
    )
    slack = estimate.peak_reserved_bytes - estimate.peak_allocated_bytes
    reserved = peak + _scale(slack, calibration.slack)
    outside, context = estimate.device_bytes - estimate.peak_reserved_bytes, context_bytes(workload.cluster.device)
    outside += _scale(context, calibration.context) - context
    return replace(
        estimate, moments=moments, peak_allocated_bytes=peak, peak_reserved_bytes=reserved,
        device_bytes=reserved + outside, step_time=_correct_time(estimate.step_time, calibration.seconds),
        margin_bytes=math.ceil(calibrated_margin_fraction(calibration) * peak), calibration=calibration,
    )  # fmt: skip


def _scale(size_bytes: int, correction: Correction | None) -> int:
    return size_bytes if correction is None else correction.scale(size_bytes)


def _correct_moment(moment: Moment, wanted: int) -> Moment:
    """Return a moment whose ledger sums up to a number of bytes."""
    rows = {row.name: getattr(moment.ledger, row.name) for row in fields(Ledger)}
    added, counted = wanted - moment.total_bytes, {name: rows[name] for name in _COUNTED}
    bearing = counted if sum(counted.values()) + added >= 0 else dict(rows)
    whole = sum(bearing.values())
    for name, size_bytes in bearing.items():
        rows[name] += int(added * size_bytes / whole) if whole else 0
    largest = max(bearing, key=lambda name: rows[name])
    rows[largest] += wanted - sum(rows.values())  # bytes that rounding left
    return replace(moment, ledger=Ledger(**rows))


def _correct_time(time: StepTime | None, correction: Correction | None) -> StepTime | None:
    if time is None or correction is None:
        return time
    return StepTime(
        fixed_seconds=time.fixed_seconds * correction.factor,
        micro_batch_seconds=time.micro_batch_seconds * correction.factor,
        step_seconds=time.step_seconds * correction.factor,
        tokens_per_second_per_device=time.tokens_per_second_per_device / correction.factor,
    )


def _budget(budget: Callable[[Workload], Budget], calibration: Calibration) -> Callable[[Workload], Budget]:
    def find(workload: Workload) -> Budget:
        if not is_meant(workload, calibration):
            return budget(workload)
        device, margin = workload.cluster.device, calibrated_margin_fraction(calibration)
        return find_budget(device, outside_bytes=context_bytes(device), margin_fraction=margin)

    return find


def describe_calibration(calibration: Calibration) -> str:
    """Return what measured runs said of the peak, in one sentence with the numbers."""
    correction = calibration.allocated
    applied = "" if correction.factor >= 1 else f", of which {correction.applied_factor:.3f} x is used"
    return (
        f"peak calibrated on {_count(correction)} of {calibration.model_type} models on {calibration.device} (torch "
        f"{calibration.torch}, {calibration.trainer}): measured was {correction.factor:.3f} x the formula's{applied}; "
        f"held-out error {_describe_error(correction)}"
    )


def describe_calibrated_speed(seconds: Correction) -> str:
    """Return who says the step time, with the error on runs that were held out."""
    return f"formula, calibrated on {_count(seconds)} of this card, held-out error {_describe_error(seconds)}"


def _count(correction: Correction) -> str:
    same = correction.num_runs - correction.num_different
    return f"{correction.num_runs} runs" + (f" ({correction.num_different} different)" if same else "")


def _describe_error(correction: Correction) -> str:
    return f"median {correction.median_error_fraction:.1%}, worst {correction.worst_error_fraction:.1%}"

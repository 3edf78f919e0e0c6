"""Why this strategy: what limits, what was preferred, sentence by sentence."""

from __future__ import annotations

from collections.abc import Iterator

from brim.planner.answerer import Answerer
from brim.planner.batch import ranks_text
from brim.planner.budget import Budget
from brim.planner.candidates import Fixed, knobs_of
from brim.planner.search import TIE_FRACTION, Costed, Found
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.units import format_size


def list_reasons(
    workload: Workload, fixed: Fixed, found: Found, best: Costed, budget: Budget, answerer: Answerer
) -> tuple[str, ...]:
    """Return why `best` was chosen, most important first."""
    return (
        _product(workload, best.strategy),
        _peak(workload, best, budget, answerer),
        *_larger_micro_batch(workload, found, best, answerer),
        *_largest(workload, best, budget, answerer),
        *_checkpointing(found, best),
        *_kept(fixed),
        budget.sentence,
        *answerer.basis,
        _speed(workload, best, answerer),
    )


def _product(workload: Workload, strategy: Strategy) -> str:
    micro, steps = strategy.micro_batch_size, strategy.gradient_accumulation_steps
    return (
        f"micro-batch {micro} x accumulation {steps} x {ranks_text(strategy.mesh.data_parallel_size)} = "
        f"{workload.batch.sequences} sequences, exactly the effective batch ({workload.batch.reason})"
    )


def _peak(workload: Workload, best: Costed, budget: Budget, answerer: Answerer) -> str:
    moment = answerer.moment(workload, best.strategy)
    left = format_size(budget.budget_bytes - best.peak_bytes)
    return f"peak {format_size(best.peak_bytes)} at {moment}, {left} below the budget"


def _larger_micro_batch(workload: Workload, found: Found, best: Costed, answerer: Answerer) -> Iterator[str]:
    larger = sorted(
        (
            costed
            for costed in (*found.fitting, *found.over)
            if costed.strategy.micro_batch_size > best.strategy.micro_batch_size
            and knobs_of(costed.strategy) == knobs_of(best.strategy)
        ),
        key=lambda costed: costed.strategy.micro_batch_size,
    )
    if best.strategy.gradient_accumulation_steps == 1:
        yield "the whole batch fits in one micro-batch per rank, so nothing is accumulated"
    elif larger and larger[0].peak_bytes > found.budget_bytes:
        moment = answerer.moment(workload, larger[0].strategy)
        over = format_size(larger[0].peak_bytes - found.budget_bytes)
        yield f"micro-batch {larger[0].strategy.micro_batch_size} would be over by {over} at {moment}"
    elif larger:
        yield f"micro-batch {larger[0].strategy.micro_batch_size} fits too, but is {_no_better(larger[0], best)}"


def _largest(workload: Workload, best: Costed, budget: Budget, answerer: Answerer) -> Iterator[str]:
    solved = answerer.largest and answerer.largest(workload, best.strategy, budget.budget_bytes)
    if solved:
        text = "the largest micro-batch that fits this way, whatever the effective batch,"
        yield f"{text} is {solved:,} (solved by trace)"


def _no_better(costed: Costed, best: Costed) -> str:
    if costed.cost > best.cost * (1 + TIE_FRACTION):
        return "slower"
    return f"no faster (within {TIE_FRACTION:.0%}) and needs {format_size(costed.peak_bytes - best.peak_bytes)} more"


def _checkpointing(found: Found, best: Costed) -> Iterator[str]:
    mode = best.strategy.activation_checkpointing
    if mode == "none":
        yield "no checkpointing: nothing is computed twice"
        return
    lighter = [costed for costed in found.fitting if costed.strategy.activation_checkpointing == "none"]
    if lighter:
        other = min(lighter, key=lambda costed: costed.cost)
        yield (
            f"{mode} checkpointing pays: without it micro-batch {other.strategy.micro_batch_size} is the best that "
            f"fits, {other.cost / best.cost:.2f}x the time"
        )
        return
    refused = [costed for costed in found.over if costed.strategy.activation_checkpointing == "none"]
    if refused:
        least = min(refused, key=lambda costed: costed.peak_bytes)
        over = format_size(least.peak_bytes - found.budget_bytes)
        micro = least.strategy.micro_batch_size
        yield f"{mode} checkpointing: without it even micro-batch {micro} is over by {over}"


def _kept(fixed: Fixed) -> Iterator[str]:
    kept = [f"{name} {value}" for name, value in fixed.items() if name != "mesh" and not isinstance(value, tuple)]
    if kept:
        yield f"kept as asked: {', '.join(kept)}"
    for name, value in fixed.items():
        if isinstance(value, tuple):
            yield f"{name} {' or '.join(value)}: all that the export target can express"


def _speed(workload: Workload, best: Costed, answerer: Answerer) -> str:
    if best.seconds is None:
        return f"{workload.cluster.device.name}: {answerer.order_text}"
    return f"step time by {answerer.speed_source}"

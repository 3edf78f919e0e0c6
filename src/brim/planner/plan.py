"""From a workload to a plan: search, say why, list what else there was."""

from __future__ import annotations

from collections.abc import Iterator

from brim.cost.setting import name_unknown
from brim.planner.alternatives import list_alternatives
from brim.planner.answerer import Answerer
from brim.planner.awkward import list_awkward
from brim.planner.candidates import Fixed
from brim.planner.reasons import list_reasons
from brim.planner.record import Plan
from brim.planner.relax import refuse_unfit
from brim.planner.schedule import build_schedule
from brim.planner.search import Found, search
from brim.planner.warnings import list_warnings
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

NEAR_FRACTION = 0.05
"""What is over budget by less than this share is looked at closely before it is refused: the formula's own error."""


def plan_workload(
    workload: Workload,
    fixed: Fixed,
    answerer: Answerer,
    *,
    assumptions: tuple[str, ...] = (),
    brim_version: str = "",
) -> Plan:
    """Return the fastest strategy that fits the budget, with everything a reader of the plan needs.

    Args:
        workload: the job; never changed.
        fixed: Strategy fields that stay as the user set them.
        answerer: who says what a strategy costs.
        assumptions: defaults that were filled in, one sentence each.
        brim_version: version to write into the record.

    Raises:
        DoesNotFit: nothing fits; relaxations are attached, cheapest first.
        InvalidStrategy: rules forbid every candidate.
    """
    budget = answerer.budget(workload)
    found = search(workload, fixed, answerer, budget.budget_bytes)
    while _confirm(workload, found, answerer):
        found = search(workload, fixed, answerer, budget.budget_bytes)
    if found.best is None:
        refuse_unfit(workload, fixed, answerer, found)
    return write_plan(workload, fixed, found, answerer, assumptions=assumptions, brim_version=brim_version)


def write_plan(
    workload: Workload, fixed: Fixed, found: Found, answerer: Answerer, *, assumptions: tuple[str, ...] = (),
    brim_version: str = "",
) -> Plan:  # fmt: skip
    """Return the plan of what a search found, with everything a reader of it needs.

    Args:
        workload: the job.
        fixed: Strategy fields that stayed as the user set them.
        found: what was asked for; something fits.
        answerer: who said what it costs.
        assumptions: defaults that were filled in, one sentence each.
        brim_version: version to write into the record.
    """
    assert found.best is not None
    budget = answerer.budget(workload)
    strategy = found.best.strategy
    estimate = answerer.estimate(workload, strategy)
    schedule = build_schedule(workload, strategy, estimate.step_time)
    rejected = list_alternatives(workload, found, answerer)
    warnings = list_warnings(workload, strategy, estimate, schedule)
    awkward = list_awkward(workload, fixed, found.best, answerer)
    sequences = strategy.micro_batch_size * strategy.gradient_accumulation_steps * strategy.mesh.data_parallel_size
    return Plan(
        workload=workload, strategy=strategy, estimate=estimate, effective_batch_size=sequences,
        effective_batch_tokens=workload.batch.tokens, budget_bytes=budget.budget_bytes,
        capacity_bytes=budget.capacity_bytes,
        reasons=list_reasons(workload, fixed, found, found.best, budget, answerer),
        assumptions=(*assumptions, *_describe_search(workload, found, answerer)),
        warnings=(*warnings, *awkward), schedule=schedule,
        rejected=rejected, num_candidates=found.num_costed, brim_version=brim_version,
    )  # fmt: skip


def _describe_search(workload: Workload, found: Found, answerer: Answerer) -> Iterator[str]:
    """Say who proposed, where it is not the formula, and what was left out."""
    if answerer.is_dear(workload):
        yield (
            f"the formula does not know {name_unknown(workload) or f'model_type {workload.model.model_type}'}: the "
            f"{answerer.source} answered the search itself, micro-batches that were not run by a line through those of "
            "2 and 3 sequences, the chosen one and near misses by a run of their own; the step time is unknown"
        )
    reasons = dict.fromkeys(reason for _, reason in found.left_out)
    for reason in reasons:
        names = dict.fromkeys(_name_variant(knobs) for knobs, why in found.left_out if why == reason)
        yield f"left out: {', '.join(names)} ({reason})"


def _name_variant(knobs: Strategy) -> str:
    offload = " with activations in host memory" if knobs.activation_offload else ""
    return f"{knobs.activation_checkpointing.replace('none', 'no')} checkpointing{offload}"


def _confirm(workload: Workload, found: Found, answerer: Answerer) -> bool:
    """Have what matters looked at closely: the choice, what would be faster and is over by little, the smallest.

    Returns whether an answer may have changed, so that the search must be made again.
    """
    if answerer.confirm is None:
        return False
    best = found.best
    least = found.budget_bytes * (1 + NEAR_FRACTION)
    near = [one for one in found.over if one.peak_bytes <= least and (best is None or one.cost < best.cost)]
    news = [answerer.confirm(workload, one.strategy, False) for one in near]
    return answerer.confirm(workload, (best or found.smallest).strategy, True) or any(news)

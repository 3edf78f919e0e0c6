"""From a workload to a plan: search, say why, list what else there was."""

from __future__ import annotations

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
        assumptions=assumptions, warnings=(*warnings, *awkward), schedule=schedule,
        rejected=rejected, num_candidates=found.num_costed, brim_version=brim_version,
    )  # fmt: skip


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

"""A plan of what was tried on the device: measured runs in the place of predicted ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from brim.cost.ledger import Estimate
from brim.planner.answerer import Answerer, budget_of
from brim.planner.candidates import Fixed
from brim.planner.plan import write_plan
from brim.planner.record import Plan, Rejected
from brim.planner.search import Costed, Found
from brim.spec.observation import Observation
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

SPEED_SOURCE = "trial (measured on this device)"


def plan_tried(
    workload: Workload, fixed: Fixed, runs: Sequence[Observation], best: Observation, estimate: Estimate,
    formula: Answerer, *, assumptions: tuple[str, ...] = (), num_candidates: int = 0, brim_version: str = "",
) -> Plan:  # fmt: skip
    """Return the plan of the fastest run that fits, the other runs as its alternatives.

    Args:
        workload: the job.
        fixed: Strategy fields the user fixed.
        runs: every strategy that was run.
        best: the chosen one.
        estimate: what it costs, as measured.
        formula: who answers for a run that died, and names moments.
        assumptions: defaults that were filled in.
        num_candidates: strategies that were looked at, run or not.
        brim_version: version to write into the record.
    """
    budget = budget_of(workload, "trial")
    costed = {run.strategy: _cost(run, formula, budget.capacity_bytes) for run in runs}
    fitting = tuple(costed[run.strategy] for run in runs if run.fits)
    over = tuple(costed[run.strategy] for run in runs if not run.fits)
    found = Found(best=costed[best.strategy], fitting=fitting, over=over, budget_bytes=budget.budget_bytes)

    def peak(workload: Workload, strategy: Strategy) -> int:
        return costed[strategy].peak_bytes if strategy in costed else formula.peak(workload, strategy)

    answerer = replace(
        formula, source="trial", estimate=lambda workload, strategy: estimate, speed_source=SPEED_SOURCE,
        peak=peak, seconds=lambda workload, strategy: costed[strategy].seconds if strategy in costed else None,
        budget=lambda workload: budget, basis=(f"{len(runs)} strategies were run on {best.device}",),
    )  # fmt: skip
    plan = write_plan(workload, fixed, found, answerer, assumptions=assumptions, brim_version=brim_version)
    said = {run.strategy: run.problem for run in runs if run.problem}
    rejected = tuple(_explain(one, said) for one in plan.rejected)
    return replace(plan, rejected=rejected, num_candidates=num_candidates or len(runs))


def _cost(run: Observation, formula: Answerer, capacity_bytes: int) -> Costed:
    """Return a run as the search costs a strategy; one that died needs at least what there was."""
    peak = run.peak_allocated_bytes
    if peak is None:
        peak = max(formula.peak(run.workload, run.strategy), capacity_bytes)
    cost = formula.order(run.workload, run.strategy) if run.step_seconds is None else run.step_seconds
    return Costed(strategy=run.strategy, peak_bytes=peak, seconds=run.step_seconds, cost=cost)


def _explain(rejected: Rejected, said: Mapping[Strategy, str]) -> Rejected:
    """Return an alternative with what its run showed as the reason."""
    problem = said.get(rejected.strategy)
    return rejected if problem is None else replace(rejected, reason=f"tried: {problem}")

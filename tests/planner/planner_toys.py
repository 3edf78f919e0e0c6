"""Toy answerers and jobs, so that the planner is tested without the formula."""

from __future__ import annotations

from typing import Any

from brim.cost.ledger import Estimate, Ledger, Moment, StepTime
from brim.planner.answerer import ORDER_TEXT, Answerer, relative_cost
from brim.planner.budget import Budget, find_budget
from brim.planner.job import Job, build_job
from brim.planner.options import read_options
from brim.planner.plan import plan_workload
from brim.planner.record import Plan
from brim.readers.hardware import read_cluster
from brim.readers.sources import read_model
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

GIB = 2**30
MIB = 2**20
_KEPT = {"none": 10, "selective": 6, "full": 2}
_TIME = {"none": 1.0, "selective": 1.12, "full": 1.3}


def make_job(model: str = "7B", gpu: str = "24GiB", **options: Any) -> Job:
    """Return a job on a built-in card."""
    said = read_options(options)
    return build_job(read_model(model)[0], read_cluster(gpu, num_nodes=said.num_nodes or 1)[0], said)


def toy_answerer(
    *,
    base_bytes: int = 6 * GIB,
    sequence_bytes: int = 300 * MIB,
    gradient_bytes: int = 0,
    launch_seconds: float = 0.05,
    timed: bool = True,
    budget_bytes: int | None = None,
) -> Answerer:
    """Return an answerer with a law one can compute by hand.

    peak = base + gradients (if it accumulates) + micro-batch x kept x sequence / 10;
    seconds = accumulation x (micro-batch x time + launch).
    """

    def peak(workload: Workload, strategy: Strategy) -> int:
        gradients = gradient_bytes if strategy.gradient_accumulation_steps > 1 else 0
        kept = _KEPT[strategy.activation_checkpointing] - (1 if strategy.activation_offload else 0)
        quantised = base_bytes // 4 if workload.recipe.quantization else base_bytes
        states = 0 if workload.recipe.method != "full" else 4 * base_bytes
        light = states // 2 if workload.recipe.optimizer == "adamw-8bit" else states
        length = workload.data.seq_len / 2048
        activations = int(strategy.micro_batch_size * kept * sequence_bytes // 10 * length)
        return quantised + light + gradients + activations

    def seconds(workload: Workload, strategy: Strategy) -> float | None:
        return time(strategy).step_seconds if timed else None

    def time(strategy: Strategy) -> StepTime:
        micro = strategy.micro_batch_size * 0.1 * _TIME[strategy.activation_checkpointing] + launch_seconds
        step = micro * strategy.gradient_accumulation_steps
        return StepTime(
            fixed_seconds=0.0, micro_batch_seconds=micro, step_seconds=step, tokens_per_second_per_device=1.0
        )

    def estimate(workload: Workload, strategy: Strategy) -> Estimate:
        total = peak(workload, strategy)
        states = total // 2 if workload.recipe.method == "full" else 0
        ledger = Ledger(parameters=total - states, optimizer_states=states)
        return Estimate(
            source="formula", moments=(Moment(name="loss", ledger=ledger),), peak_allocated_bytes=total,
            peak_reserved_bytes=total, device_bytes=total, peak_moment="loss",
            step_time=time(strategy) if timed else None,
        )  # fmt: skip

    def budget(workload: Workload) -> Budget:
        if budget_bytes is not None:
            return Budget(budget_bytes=budget_bytes, capacity_bytes=budget_bytes, sentence="as given")
        return find_budget(workload.cluster.device, outside_bytes=0, margin_fraction=0.0)

    return Answerer(
        source="formula", estimate=estimate, peak=peak, moment=lambda workload, strategy: "loss", seconds=seconds,
        budget=budget, order=relative_cost, order_text=ORDER_TEXT,
    )  # fmt: skip


def make_plan(answerer: Answerer | None = None, **options: Any) -> Plan:
    job = make_job(**options)
    return plan_workload(job.workload, job.fixed, answerer or toy_answerer(), assumptions=job.assumptions)

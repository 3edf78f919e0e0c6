"""From what a child answered to the observation that history keeps, and to the outcome that a climb learns from."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from brim.cost.ledger import Estimate, StepTime
from brim.planner.budget import USED_PERCENT
from brim.planner.record import Plan
from brim.spec.observation import Observation, Prediction
from brim.spec.workload import with_seq_len
from brim.trials.ladder import Outcome
from brim.trials.request import Answer
from brim.units import format_size


def observe(plan: Plan, answer: Answer, capacity_bytes: int) -> Observation:
    """Return what was measured of a plan, beside what it had predicted.

    Args:
        plan: the job and the strategy that was run; its estimate is the prediction.
        answer: of all ranks together.
        capacity_bytes: what the device could hold.
    """
    strategy = plan.strategy
    fixed, micro = split_seconds(answer.seconds)
    step = None if micro is None else (fixed or 0.0) + strategy.gradient_accumulation_steps * micro
    if step is None and strategy.gradient_accumulation_steps in answer.seconds:
        step = answer.seconds[strategy.gradient_accumulation_steps]
    # a trainer of the user's may bring longer rows than planned: another job
    workload = with_seq_len(plan.workload, max(answer.longest_tokens or 0, plan.workload.data.seq_len))
    sequences = strategy.micro_batch_size * strategy.gradient_accumulation_steps
    tokens = sequences * workload.data.seq_len * answer.real_fraction
    problem = find_problem(answer, plan.budget_bytes)
    said = plan.estimate
    return Observation(
        kind="trial", workload=workload, strategy=strategy, finished=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        device=answer.device, capacity_bytes=capacity_bytes, driver=answer.driver, versions=answer.versions,
        num_ranks=strategy.mesh.data_parallel_size, num_steps=answer.num_steps, fits=not problem, problem=problem,
        peak_allocated_bytes=answer.peak_allocated_bytes, peak_reserved_bytes=answer.peak_reserved_bytes,
        device_bytes=answer.device_bytes, num_retries=answer.num_retries, fixed_seconds=fixed,
        micro_batch_seconds=micro, step_seconds=step, tokens_per_second=tokens / step if step else None,
        longest_tokens=answer.longest_tokens,
        predicted=Prediction(
            source=said.source, peak_allocated_bytes=said.peak_allocated_bytes,
            peak_reserved_bytes=said.peak_reserved_bytes, device_bytes=said.device_bytes,
            step_seconds=said.step_time.step_seconds if said.step_time else None,
        ),
    )  # fmt: skip


def split_seconds(seconds: Mapping[int, float]) -> tuple[float | None, float | None]:
    """Return what a step costs once and what each micro-batch costs, from steps of two counts; None where unknown."""
    if len(seconds) < 2:
        return None, None
    few, many = min(seconds), max(seconds)
    micro = max((seconds[many] - seconds[few]) / (many - few), 0.0)
    if not micro:  # a longer step took no longer: the clock is too coarse or the machine too busy to tell
        return None, None
    fixed = max(seconds[few] - few * micro, 0.0)
    return fixed, min(micro, seconds[few] / few)


def find_problem(answer: Answer, budget_bytes: int) -> str:
    """Return why a strategy does not fit; empty if it does."""
    if answer.ending == "oom":
        return "out of memory"
    if answer.ending != "done":
        return answer.problem or "it died"
    if answer.num_retries:
        return f"{answer.num_retries} allocator retries: the pool had to be given back to go on"
    held = find_held(answer)
    if held is not None and held > budget_bytes:
        return f"it ran, but holds {format_size(held)}, and a plan may use {format_size(budget_bytes)}"
    return ""


def find_held(read: Answer | Observation) -> int | None:
    """Return the bytes that have to stay within a plan's budget: those of tensors, and the part of the pool that
    stands for the whole card; None if it died.

    A budget is the part of a card that tensors may take, the rest being left to the pool: a pool that has taken more
    than the card counts as tensors over the budget.
    """
    if read.peak_allocated_bytes is None:
        return None
    return max(read.peak_allocated_bytes, (read.peak_reserved_bytes or 0) * USED_PERCENT // 100)


def read_outcome(run: Observation) -> Outcome:
    """Return a run as a climb learns from it."""
    return Outcome(
        strategy=run.strategy, fits=run.fits, problem=run.problem, died=run.peak_allocated_bytes is None,
        peak_bytes=run.peak_allocated_bytes, held_bytes=find_held(run), seconds=run.step_seconds,
    )  # fmt: skip


def read_estimate(observation: Observation, notes: tuple[str, ...] = ()) -> Estimate:
    """Return a run that ended as an answer to what its strategy costs.

    Raises:
        ValueError: it died, and nothing was read.
    """
    peak, reserved = observation.peak_allocated_bytes, observation.peak_reserved_bytes
    if peak is None or reserved is None or observation.device_bytes is None:
        raise ValueError("a run that died has no figures")
    return Estimate(
        source="trial", moments=(), peak_allocated_bytes=peak, peak_reserved_bytes=reserved,
        device_bytes=observation.device_bytes, peak_moment="", step_time=read_time(observation),
        notes=(f"measured in {observation.num_steps} optimizer steps on {observation.device}", *notes),
    )  # fmt: skip


def read_time(observation: Observation) -> StepTime | None:
    """Return the times of a run; None where they were not told apart."""
    step, tokens = observation.step_seconds, observation.tokens_per_second
    if step is None or tokens is None:
        return None
    micro = observation.micro_batch_seconds
    steps = observation.strategy.gradient_accumulation_steps
    return StepTime(
        fixed_seconds=observation.fixed_seconds or 0.0, micro_batch_seconds=step / steps if micro is None else micro,
        step_seconds=step, tokens_per_second_per_device=tokens,
    )  # fmt: skip

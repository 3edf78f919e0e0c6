"""The record of a watched run, from the worst rank's numbers and the plan."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from brim.devices.driver import read_driver
from brim.planner.record import Plan
from brim.runtime.forecast import place
from brim.runtime.run_record import OUT_OF_MEMORY, Expected, Measured, RunRecord
from brim.runtime.sight import Sight, Verdict
from brim.runtime.worst import Worst
from brim.spec.observation import Observation, Prediction
from brim.spec.strategy import Strategy
from brim.versions import list_versions

if TYPE_CHECKING:
    from brim.runtime.observe import Task

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "bitsandbytes", "liger_kernel", "unsloth")
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_RENAMED = (2, 9)
"""First torch that reads PYTORCH_ALLOC_CONF. Source: c10/core/AllocatorConfig.h."""


def build_record(
    task: Task, strategy: Strategy, worst: Worst, sight: Sight, verdicts: tuple[Verdict, ...], *, name: str,
    state: Literal["running", "ended", "died"], problem: str,
) -> RunRecord:  # fmt: skip
    """Return the record of a run as it stands.

    Args:
        task: what is watched.
        strategy: how it is run now.
        worst: numbers of the worst rank.
        sight: the same beside the plan's.
        verdicts: what was said.
        name: of the device.
        state: whether it still runs.
        problem: why it died.
    """
    from brim import __version__

    measured = _measure(worst, sight, name)
    over = state != "running" and task.plan is not None
    return RunRecord(
        brim_version=__version__, state=state, problem=problem, measured=measured, verdicts=verdicts,
        expected=_expect(task.plan, sight) if task.plan is not None else None,
        observation=_observe(task.plan, strategy, measured, problem) if over and task.plan is not None else None,
    )  # fmt: skip


def _measure(worst: Worst, sight: Sight, name: str) -> Measured:
    numbers = worst.numbers

    def size(number: float) -> int | None:
        return round(number) if number > 0 else None

    return Measured(
        num_steps=sight.step, num_ranks=worst.num_ranks, device=name, capacity_bytes=size(numbers.capacity_bytes),
        peak_allocated_bytes=sight.peak_allocated_bytes, aside_bytes=sight.aside_bytes,
        peak_reserved_bytes=size(numbers.reserved_bytes),
        device_bytes=size(numbers.device_bytes), num_retries=int(numbers.num_retries), num_ooms=int(numbers.num_ooms),
        longest_tokens=sight.seen_tokens, coming_tokens=sight.coming_tokens, step_seconds=sight.step_seconds,
        tokens_per_second=sight.tokens_per_second, padding_fraction=sight.padding_fraction,
    )  # fmt: skip


def _expect(plan: Plan, sight: Sight) -> Expected:
    time = plan.estimate.step_time
    return Expected(
        prediction=_predict(plan), longest_tokens=plan.workload.data.seq_len, budget_bytes=plan.budget_bytes,
        capacity_bytes=plan.capacity_bytes, as_run_allocated_bytes=sight.seen_estimate_bytes,
        as_run_seconds=sight.estimate_seconds,
        tokens_per_second=time.tokens_per_second_per_device if time is not None else None,
    )  # fmt: skip


def _predict(plan: Plan) -> Prediction:
    estimate, time = plan.estimate, plan.estimate.step_time
    return Prediction(
        source=estimate.source, peak_allocated_bytes=estimate.peak_allocated_bytes,
        peak_reserved_bytes=estimate.peak_reserved_bytes, device_bytes=estimate.device_bytes,
        step_seconds=time.step_seconds if time is not None else None,
    )  # fmt: skip


def _observe(plan: Plan, strategy: Strategy, measured: Measured, problem: str) -> Observation:
    """Return what history keeps of a run; `workload` is the planned one, `longest_tokens` says how far it got.

    Sequences longer than planned are another job, of which nobody had said anything: it is kept with their length.
    Where evaluation took more than training, what allocator and card held is no measure of the strategy: None. A run
    that died of something else than memory had room for its steps: it fits.
    """
    mine = measured.aside_bytes is None
    job = place(plan.workload, measured.device, measured.capacity_bytes or _host_bytes())
    longest, planned = measured.longest_tokens, plan.workload.data.seq_len
    is_longer = longest is not None and longest > planned
    if is_longer:
        job = replace(job, data=replace(job.data, seq_len=longest))
    why = OUT_OF_MEMORY if problem == OUT_OF_MEMORY else _find_problem(measured)
    return Observation(
        kind="watch", workload=job, strategy=strategy, device=measured.device,
        finished=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), driver=read_driver(measured.device == "cpu"),
        capacity_bytes=measured.capacity_bytes or _host_bytes(), versions=_list_loaded(),
        num_ranks=measured.num_ranks, num_steps=measured.num_steps, fits=not why, problem=why,
        peak_allocated_bytes=measured.peak_allocated_bytes,
        peak_reserved_bytes=measured.peak_reserved_bytes if mine else None,
        device_bytes=measured.device_bytes if mine else None, num_retries=measured.num_retries,
        step_seconds=measured.step_seconds, tokens_per_second=measured.tokens_per_second, longest_tokens=longest,
        predicted=None if is_longer else _predict(plan),
    )  # fmt: skip


def _find_problem(measured: Measured) -> str:
    held, capacity = measured.peak_reserved_bytes, measured.capacity_bytes
    if measured.num_ooms:
        return f"{OUT_OF_MEMORY}, {measured.num_ooms} allocations refused"
    if measured.num_retries:
        return f"{measured.num_retries} allocator retries"
    return "spill to host memory" if held and capacity and held > capacity else ""


def _host_bytes() -> int:
    """Return the memory of this machine: what a CPU without a cap has."""
    import psutil

    return psutil.virtual_memory().total


def _list_loaded() -> tuple[tuple[str, str], ...]:
    """Return the releases of what is loaded."""
    return list_versions(name.replace("_", "-") for name in _PACKAGES if name in sys.modules)


def is_expandable() -> bool:
    """Return whether the allocator was started with segments that grow."""
    return any("expandable_segments:true" in os.environ.get(name, "").lower() for name in _VARIABLES)


def find_allocator_variable() -> str:
    """Return the environment variable that this torch reads its allocator's settings from."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return "PYTORCH_ALLOC_CONF" if version >= _RENAMED else "PYTORCH_CUDA_ALLOC_CONF"

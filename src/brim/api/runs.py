"""Strategies run for real: one of a plan, or the climb to the fastest that fits this device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from brim.api.files import load_plan
from brim.api.jobs import read_job, read_shape
from brim.api.measured import add_observation, correct_formula, read_calibration
from brim.errors import BrimError, DoesNotFit, InvalidInput, MissingExtra
from brim.planner.answerer import answer_by_formula
from brim.planner.job import Job
from brim.planner.options import JobOptions, read_options
from brim.planner.plan import plan_workload
from brim.planner.record import Plan
from brim.spec.device import Cluster, hold_cpu
from brim.spec.model import ModelShape
from brim.spec.observation import Observation
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.units import MIB, format_size

if TYPE_CHECKING:
    from brim.cost.correction import Calibration
    from brim.cost.ledger import Estimate
    from brim.readers.nvml import LiveDevice
    from brim.trials.record import Trial
    from brim.trials.trial import Bench

Say = Callable[[Observation], None]
_HOST_SHARE = 2
"""A CPU that stands in for a GPU takes one part in so many of the host's free memory."""
_SURE = 3.0
"""A prediction that measured runs have corrected may be off by so many times its worst held-out error."""
_LEAST_SPREAD = 0.05
"""How far it may be off at least."""


def trial(
    subject: str | ModelShape | Plan, *, device: str | None = None, script: str | None = None,
    climb: bool | None = None, say: Say = lambda run: None, **options: Any,
) -> Trial:  # fmt: skip
    """Return what real optimizer steps on this machine's device show, run in a child process.

    Weights are random, sequences as long as planned; nothing of yours is read, trained or written, unless `script`
    names a function that returns your own trainer, which is then run in the child.

    Args:
        subject: a model as for `plan`, a plan, or the file it was saved to.
        device: `auto` for this machine's GPU; a smaller card or size (`24GiB`) holds the GPU to that; `cpu:2GiB` is a
            CPU held to a size. The plan's own device if None; without a GPU, a CPU held to half of what is free.
        script: `train.py:make_trainer`, a function that returns a transformers.Trainer or one of its kin.
        climb: whether to search for the fastest strategy that fits, rather than run one; yes for a model, no for a
            plan.
        say: is told of every run as it ends.
        options: as for `plan`, where the subject is a model.

    Raises:
        InvalidInput: options beside a plan, or what cannot be meant.
        MissingExtra: torch or the trainer is not installed.
        ProbeFailed: the step does not run, for a reason that is no matter of memory.
    """
    from brim.checks.script import is_plan

    strategy: Strategy | None = None
    if isinstance(subject, Plan) or is_plan(subject):
        bench, strategy = _read_plan(subject, device, options)  # type: ignore[arg-type]
    else:
        bench = _read_model(subject, device, options)
    bench.script, bench.say = script, say
    from brim.trials.trial import try_fastest, try_strategy

    bench.workload = replace(bench.workload, cluster=match_ranks(bench.workload.cluster, subject))
    if climb if climb is not None else strategy is None:
        return try_fastest(bench)
    return try_strategy(bench, strategy or _choose(bench))


def match_ranks(cluster: Cluster, subject: object) -> Cluster:
    """Return devices as many as the ranks that torchrun has started: each of them runs the same trial.

    Raises:
        InvalidInput: the job is for another number of devices.
    """
    from brim.checks.ranks import count_ranks

    ranks, planned = count_ranks(), cluster.num_devices
    if ranks > 1 and planned == 1:
        return replace(cluster, devices_per_node=ranks)
    if ranks == planned:
        return cluster
    name = subject if isinstance(subject, str) else "plan.json"
    raise InvalidInput(
        f"the job is for {planned} devices, this trial has {ranks}; start it on every device: "
        f"torchrun --nproc-per-node {planned} -m brim trial {name}"
    )


def plan_by_trial(subject: str | ModelShape, options: Mapping[str, Any]) -> Plan:
    """Return the plan of the fastest strategy that was found to fit this device.

    Raises:
        DoesNotFit: nothing that was run fits.
    """
    found = trial(subject, **{name: value for name, value in options.items() if name != "by"})
    if found.plan is None:
        raise unfit(found)
    return found.plan


def estimate_by_trial(job: Job, said: JobOptions, strategy: Strategy) -> Estimate:
    """Return what one strategy costs, as real steps on its device show.

    Raises:
        DoesNotFit: it ran out of memory.
    """
    from brim.trials.observe import read_estimate
    from brim.trials.trial import try_strategy

    cluster, remark = place(job.workload.cluster)
    placed = replace(job, workload=replace(job.workload, cluster=cluster))
    found = try_strategy(find_bench(placed, said), strategy)
    run = found.runs[0]
    if run.peak_allocated_bytes is None:
        raise unfit(found)
    return read_estimate(run, (*found.notes, *((remark,) if remark else ())))


def unfit(found: Trial) -> DoesNotFit:
    """Return the error of a trial in which nothing fits."""
    run = min(found.runs, key=lambda one: one.strategy.micro_batch_size, default=None)
    if run is None:
        return DoesNotFit("no strategy was run", gap_bytes=0, at_moment="")
    strategy, peak = run.strategy, run.peak_allocated_bytes
    text = (
        f"nothing that was tried fits: micro-batch {strategy.micro_batch_size} with "
        f"{strategy.activation_checkpointing.replace('none', 'no')} checkpointing: {run.problem}; try a larger device, "
        "a shorter --seq-len, or --method lora or qlora"
    )
    gap = 0 if peak is None else max(0, peak - found.budget_bytes)
    return DoesNotFit(text, gap_bytes=gap, at_moment="the trial", budget_bytes=found.budget_bytes)


def find_bench(job: Job, said: JobOptions) -> Bench:
    """Return a job on its device, ready to be run.

    Raises:
        MissingExtra: torch is not installed.
    """
    from brim import __version__
    from brim.checks.ranks import is_first

    try:
        from brim.trials.trial import Bench
    except ModuleNotFoundError as error:
        raise MissingExtra(package=error.name or "torch", extra="train", purpose="a trial") from None
    wants_history = said.history is not False
    calibration, remarks = read_calibration(job.workload) if wants_history else (None, ())
    return Bench(
        workload=job.workload, fixed=job.fixed, config=job.config, spread=_find_spread(calibration),
        formula=correct_formula(answer_by_formula(), calibration), assumptions=(*job.assumptions, *remarks),
        note=add_observation if wants_history and is_first() else lambda run: None, brim_version=__version__,
    )  # fmt: skip


def _read_model(subject: str | ModelShape, device: str | None, options: Mapping[str, Any]) -> Bench:
    """Return a job said in options."""
    said = read_options(dict(options))
    gpu, remark = _find_gpu(device or said.gpu)
    job = read_job(subject, replace(said, gpu=gpu), known_only=True)
    cluster, placed = place(job.workload.cluster)
    remarks = (one for one in (remark, placed) if one)
    job = replace(
        job, workload=replace(job.workload, cluster=cluster), assumptions=(*job.assumptions, *remarks)
    )
    return find_bench(job, said)


def _read_plan(subject: str | Plan, device: str | None, options: Mapping[str, Any]) -> tuple[Bench, Strategy]:
    """Return the job of a plan, and its strategy."""
    unknown = sorted(name for name, value in options.items() if value is not None and name != "history")
    if unknown:
        raise InvalidInput(f"a plan says its job itself; leave {', '.join(unknown)} out, or name the model")
    plan = subject if isinstance(subject, Plan) else load_plan(subject)
    said = read_options(dict(options))
    _, origin, config = read_shape(plan.workload.model.name, refresh=False, known_only=False)
    cluster, remark = _replace_device(plan.workload, device)
    job = Job(
        workload=replace(plan.workload, cluster=cluster), fixed={}, config=config,
        assumptions=(*plan.assumptions, *origin, *((remark,) if remark else ())),
    )  # fmt: skip
    return find_bench(job, said), plan.strategy


def _replace_device(workload: Workload, device: str | None) -> tuple[Cluster, str]:
    """Return a plan's devices as they are run: those named, else its own, where this machine has them."""
    if device is None:
        return place(workload.cluster)
    from brim.readers.hardware import read_cluster

    gpu, remark = _find_gpu(device)
    found, about = read_cluster(gpu)
    cluster, placed = place(replace(workload.cluster, device=found.device))
    return cluster, "; ".join(part for part in (remark, about, placed) if part)


def _find_gpu(said: str | None) -> tuple[str, str]:
    """Return the device to plan for: what was said, this machine's GPU, or a CPU where there is none."""
    if said is not None and said.strip().lower() != "auto":
        return said, ""
    if find_live() is not None:
        return "auto", ""
    return f"cpu:{_spare_bytes()}B", "no GPU here: run on this CPU, held to half of the memory that is free"


def place(cluster: Cluster) -> tuple[Cluster, str]:
    """Return devices as this machine can run them, and what to say if they are others than planned.

    A GPU of this machine is held to the size of the planned one. Without a GPU, a CPU is.
    """
    planned = cluster.device
    if planned.vendor == "cpu":
        return cluster, ""
    live = find_live()
    if live is None:
        size_bytes = min(planned.plannable_bytes, _spare_bytes()) // MIB * MIB
        host = hold_cpu(size_bytes, "the planned GPU's, or half of what this host has free")
        return replace(cluster, device=host), f"no GPU here: run on this CPU, held to {format_size(size_bytes)}"
    if live.free_bytes >= planned.plannable_bytes:
        return cluster, ""
    device = replace(planned, free_bytes=min(live.free_bytes, planned.capacity_bytes))
    return replace(cluster, device=device), f"this GPU has {format_size(live.free_bytes)} free, less than planned"


def find_live() -> LiveDevice | None:
    """Return the first GPU that a program started now would see; None if there is none."""
    from brim.readers.nvml import read_live_devices

    try:
        return read_live_devices()[0][0]
    except BrimError:
        return None


def _spare_bytes() -> int:
    """Return what a CPU that stands in for a GPU may take of the host, in whole MiB, bytes."""
    return read_host_bytes() // _HOST_SHARE // MIB * MIB


def read_host_bytes() -> int:
    """Return the memory of the host that is free for programs, bytes."""
    import psutil

    return int(psutil.virtual_memory().available)


def _choose(bench: Bench) -> Strategy:
    """Return the strategy that the formula chooses.

    Raises:
        DoesNotFit: it finds none.
    """
    return plan_workload(bench.workload, bench.fixed, bench.formula).strategy


def _find_spread(calibration: Calibration | None) -> float:
    """Return how far predictions may be off, as measured runs of this card say where there are some."""
    from brim.trials.ladder import UNTRIED_SPREAD

    if calibration is None:
        return UNTRIED_SPREAD
    return min(UNTRIED_SPREAD, max(_LEAST_SPREAD, _SURE * calibration.allocated.worst_error_fraction))

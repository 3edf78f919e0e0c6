"""Run a request in this process and say what it took: the device, the cap, the steps, the counters."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch

from brim.devices.capped import CappedMemory
from brim.devices.driver import read_driver
from brim.devices.meter import CappedMeter, CudaMeter, Meter
from brim.errors import BrimError, first_line
from brim.probes.follow import describe_failure
from brim.runtime.restore import is_out_of_memory
from brim.trials.request import Answer, Request
from brim.versions import list_versions

FEW, MANY = 2, 4
"""Micro-batches of a step whose memory is read, and of one that tells what a micro-batch costs."""
_STEPS = 4
"""Optimizer steps: the first makes the optimizer's states, the others are timed, and the fastest counts: whatever else
the machine does only adds."""
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "liger-kernel", "flash-attn")


class Run(Protocol):
    """A model, its optimizer and its loop, ready to train."""

    longest_tokens: int
    """Tokens of the longest sequence."""
    notes: tuple[str, ...]
    """What was assumed."""

    def train(self, num_micro_batches: int, num_steps: int) -> list[float]:
        """Run optimizer steps and return the seconds of each."""

    def count_real(self) -> float:
        """Return the share of tokens that are no padding."""


def perform(request: Request) -> Answer:
    """Return what running a request showed; whatever it raises is an answer too."""
    about = Answer(ending="failed", versions=list_versions(_PACKAGES))
    try:
        with open_device(request) as meter:
            about = replace(about, device=meter.name, driver=read_driver(request.on_cpu))
            return measure(request, meter, about)
    except Exception as error:
        if comes_of_memory(error):
            return replace(about, ending="oom", problem=first_line(error))
        return replace(about, problem=str(error) if isinstance(error, BrimError) else describe_failure(error))


def measure(request: Request, meter: Meter, about: Answer) -> Answer:
    """Train at two counts of micro-batches, the memory of the first, the times of both."""
    run = prepare_run(request, meter)
    steps = request.plan.strategy.gradient_accumulation_steps
    few, many = (1, FEW) if steps == 1 else (FEW, MANY)
    seconds = {few: min(run.train(few, _STEPS)[1:])}
    read = meter.read()
    answer = replace(
        about, ending="done", peak_allocated_bytes=read.peak_allocated_bytes,
        peak_reserved_bytes=read.peak_reserved_bytes,
        device_bytes=read.device_bytes - read.reserved_bytes + read.peak_reserved_bytes,
        num_retries=read.num_retries, num_steps=_STEPS,
        longest_tokens=run.longest_tokens, real_fraction=run.count_real(), notes=run.notes, seconds=seconds,
    )  # fmt: skip
    try:
        seconds[many] = min(run.train(many, _STEPS)[1:])
    except torch.OutOfMemoryError:  # one more micro-batch than the strategy has: no part of the answer
        return answer
    return replace(answer, seconds=seconds)


def prepare_run(request: Request, meter: Meter) -> Run:
    """Return the model in its loop: the user's trainer, the plan's own, or a plain loop."""
    from brim.trials.plain import LOOPS, plan_plain
    from brim.trials.trainers import build_trainer, read_script

    engine = request.plan.workload.recipe.engine.name
    if request.script is not None:
        return read_script(request, meter)
    return plan_plain(request, meter) if engine in LOOPS else build_trainer(request, meter)


@contextlib.contextmanager
def open_device(request: Request) -> Iterator[Meter]:
    """Give this process its device, capped, and the other ranks of its run."""
    if request.on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        meet(request.meeting, "gloo")
        capped = CappedMemory(request.capacity_bytes)
        with capped:
            yield CappedMeter(capped)
        return
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    meet(request.meeting, "nccl")
    meter = CudaMeter(device)
    cap_cuda(meter, request.capacity_bytes)
    yield meter


def cap_cuda(meter: CudaMeter, capacity_bytes: int) -> None:
    """Let the process have what a smaller card would: its context and what others hold come off first."""
    total_bytes = meter.capacity_bytes
    if capacity_bytes >= total_bytes:
        return
    torch.zeros(1, device="cuda")  # the context is made
    read = meter.read()
    outside_bytes = read.device_bytes - read.reserved_bytes
    torch.cuda.set_per_process_memory_fraction(max(capacity_bytes - outside_bytes, 0) / total_bytes)


def meet(meeting: str | None, backend: str) -> None:
    """Join the other ranks' processes of this request, over the store that torchrun keeps."""
    if meeting is None:
        return
    import torch.distributed as dist

    from brim.trials.ranks import open_store

    store = dist.PrefixStore(meeting, open_store())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def comes_of_memory(error: BaseException | None) -> bool:
    """Return whether an error is an out-of-memory, or was raised while one was handled."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if is_out_of_memory(error):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False

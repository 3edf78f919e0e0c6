"""Bytes that real code takes on the CPU, metered by torch.profiler's memory records, and that a traced step takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from brim.probes.model import give_tensors, prepare_model
from brim.probes.preferences import follow_reference, prepare_reference
from brim.probes.step import plan_step, run_steps
from brim.probes.tracker import StorageTracker
from brim.probes.values import KnownValues


def measure_peak(run: Callable[[], Any]) -> int:
    """Return the most bytes that are live while `run` runs, above what was live before."""
    gc.collect()  # what an earlier profile saw allocated would be seen freed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        run()
    live = highest = 0
    records = session.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(records, key=lambda one: one.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest


def trace_peak(case: Any) -> int:
    """Return the same of a case's step on fake tensors, with the CPU's kernels and without rounding."""
    recipe = case.workload.recipe
    model = prepare_model(case.build, recipe, case.strategy)
    reference = prepare_reference(case.build, recipe, case.strategy, shorten=None)
    tracker, known = StorageTracker(scalar=1.0, kind=FakeTensor, block_bytes=1), KnownValues()
    tracker.read_scalar = known.read_scalar
    with FakeTensorMode(), known:
        give_tensors(model)
        tracker.follow((*model.parameters(), *model.buffers()), "parameter")
        follow_reference(reference, tracker)
        given = sum(event.num_bytes for event in tracker.events)
        step = plan_step(case.workload, case.strategy, model, case.make_inputs, tracker, reference)
        with tracker:
            run_steps(step)
    live = highest = 0
    for event in tracker.events:
        live += event.num_bytes
        highest = max(highest, live)
    return highest - given


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Give every weight a small number, so that real steps stay finite."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(0.01)
    return model

"""Measured runs that nobody measured: a real job with made-up figures."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from brim.api.jobs import read_job
from brim.cost.estimate import estimate
from brim.planner.candidates import list_variants
from brim.planner.options import read_options
from brim.spec.observation import Observation, Prediction
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

GIB = 2**30


@cache
def read_workload(model: str = "8B", gpu: str = "rtx-4090", method: str = "qlora") -> tuple[Workload, Strategy]:
    """Return a job on a built-in card, and one way to run it."""
    job = read_job(model, read_options({"gpu": gpu, "method": method, "effective_batch_size": 32}))
    return job.workload, list_variants(job.workload, job.fixed)[0].at(1, 32)


def observe(
    micro: int = 1, factor: float = 1.0, *, model: str = "8B", method: str = "qlora", **said: Any
) -> Observation:
    """Return a run whose peak and step time are the formula's times a factor."""
    workload, strategy = read_workload(model, method=method)
    strategy = replace(strategy, micro_batch_size=micro, gradient_accumulation_steps=32 // micro)
    answer = estimate(workload, strategy)
    seconds = answer.step_time.step_seconds if answer.step_time else None
    facts: dict[str, Any] = {
        "kind": "trial", "workload": workload, "strategy": strategy, "finished": "2026-03-01T12:00:00Z",
        "device": "NVIDIA GeForce RTX 4090", "capacity_bytes": workload.cluster.device.capacity_bytes,
        "driver": "550.54.14", "versions": (("torch", "2.6.0+cu124"), ("trl", "1.16.0")), "num_steps": 3, "fits": True,
        "peak_allocated_bytes": round(answer.peak_allocated_bytes * factor),
        "step_seconds": seconds and seconds * factor,
        "predicted": Prediction(
            source="formula", peak_allocated_bytes=answer.peak_allocated_bytes,
            peak_reserved_bytes=answer.peak_reserved_bytes, device_bytes=answer.device_bytes, step_seconds=seconds,
        ),
    }  # fmt: skip
    return Observation(**(facts | said))

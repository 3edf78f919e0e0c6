"""A real step on the CPU, metered by torch.profiler's memory records, beside the same step traced.

brim's own tracker has no part in the real side. Attention is eager and weights are fp32, where the CPU's kernels
allocate what the operators say and nothing inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile, record_function

from brim.probes.model import give_tensors, prepare_model
from brim.probes.step import plan_step, run_steps
from brim.probes.tracker import StorageTracker
from brim.readers.hf_config import read_config
from brim.spec.data import DataProfile
from brim.spec.device import Cluster
from brim.spec.recipe import Engine, Lora, Recipe
from brim.spec.strategy import Strategy
from brim.spec.workload import BatchTarget, Workload
from brim.tables.read import find_device
from tiny_models import tiny_class, tiny_config

MARK = "phase: "
DEPTH, BATCH, LENGTH = 3, 2, 128


class Marks:
    """Stands where the tracker stands, and writes the phases into the profile."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.next_key, self.layer = 0, -1

    def begin(self, phase: str) -> None:
        with record_function(MARK + phase):
            pass

    def label(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        for _ in tensors:
            pass

    def tag(self, tensors: Iterable[torch.Tensor], layer: int) -> None:
        pass

    def layer_of(self, tensor: torch.Tensor) -> int:
        return -1

    def label_live(self, made_from: int, category: str) -> None:
        pass

    def move_to_host(self, tensors: list[torch.Tensor]) -> None:
        pass


class Case:
    """A tiny model and a way to train it."""

    def __init__(
        self, family: str, *, method: str = "full", engine: Engine | None = None, dtype: str = "fp32",
        attention: str = "eager", autocast: bool = False, depth: int = DEPTH, gpu: str = "a100-80gb", **knobs: Any,
    ) -> None:  # fmt: skip
        self.config = tiny_config(family, depth, attention="eager" if attention == "eager" else "sdpa")
        shape = read_config(self.config.to_dict(), name=family)
        names = sorted({linear.name for group in shape.groups for linear in group.attention.linears})
        recipe = Recipe(
            method=method, weight_dtype=dtype, autocast=autocast, engine=engine or Engine(name="transformers"),  # type: ignore[arg-type]
            lora=Lora(r=8, alpha=16, target_modules=tuple(names)) if method == "lora" else None,
        )  # fmt: skip
        batch = BatchTarget(sequences=2, tokens=256, low=1, high=2, min_useful=1, max_useful=2, reason="test")
        self.workload = Workload(
            model=shape, data=DataProfile(seq_len=LENGTH, packing=True), recipe=recipe, batch=batch,
            cluster=Cluster(device=find_device(gpu)), task="fine-tuning",
        )  # fmt: skip
        self.strategy = Strategy(
            **{"micro_batch_size": BATCH, "gradient_accumulation_steps": 1, "attention_kernel": attention,
               "optimizer_kernel": "foreach", **knobs}
        )  # fmt: skip

    def build(self) -> torch.nn.Module:
        return tiny_class(self.config)(self.config)

    def make_inputs(self) -> Mapping[str, torch.Tensor]:
        shape = (self.strategy.micro_batch_size, LENGTH)
        return {"input_ids": torch.zeros(shape, dtype=torch.long), "labels": torch.zeros(shape, dtype=torch.long)}


def measure_phases(case: Case) -> dict[str, int]:
    """Return the most bytes of a real step above what the model takes, by phase."""
    model = prepare_model(case.build, case.workload.recipe, case.strategy)
    give_tensors(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(0.01)
    step = plan_step(case.workload, case.strategy, model, case.make_inputs, Marks())  # type: ignore[arg-type]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        run_steps(step)
    return _highest(session.profiler.kineto_results.events())  # type: ignore[union-attr]


def _highest(events: Iterable[Any]) -> dict[str, int]:
    wanted = [event for event in events if event.name() == "[memory]" or event.name().startswith(MARK)]
    live, phase = 0, "before"
    highest: dict[str, int] = {}
    for event in sorted(wanted, key=lambda one: one.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
        else:
            phase = event.name().removeprefix(MARK)
        highest[phase] = max(highest.get(phase, 0), live)
    return highest


def trace_phases(case: Case) -> dict[str, int]:
    """Return the same of the step on fake tensors, with the CPU's kernels and without rounding."""
    tracker = StorageTracker(scalar=1.0, kind=FakeTensor, block_bytes=1)
    model = prepare_model(case.build, case.workload.recipe, case.strategy)
    with FakeTensorMode():
        give_tensors(model)
        tracker.follow((*model.parameters(), *model.buffers()), "parameter")
        tracker.begin("before")
        with tracker:
            run_steps(plan_step(case.workload, case.strategy, model, case.make_inputs, tracker))
    live, highest = 0, {}
    for event in tracker.events:
        live += event.num_bytes if event.phase else 0
        highest[event.phase] = max(highest.get(event.phase, 0), live)
    del highest[""]
    return highest

"""A plain loop, and Accelerate's, for real: the step that the trace follows, on real tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from brim.devices.meter import Meter
from brim.errors import ProbeFailed
from brim.probes.checkpointing import checkpoint
from brim.probes.inputs import plan_inputs
from brim.probes.optimizers import is_from_bitsandbytes
from brim.probes.step import Step, note_step, plan_step, run_steps
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.tables.read import find_optimizer
from brim.trials.batches import count_real, fill_tokens, list_special
from brim.trials.clock import Clock
from brim.trials.model import adapt, find_device, load_model
from brim.trials.request import Request

LOOPS = ("plain", "accelerate")


class PlainRun:
    """A step that is run again and again, with more or fewer micro-batches."""

    def __init__(self, step: Step, clock: Clock, notes: tuple[str, ...]) -> None:
        """Take a step that has not run yet."""
        self._step, self._clock = step, clock
        self.notes, self.longest_tokens = notes, step.workload.model.sequence_tokens or step.workload.data.seq_len

    def train(self, num_micro_batches: int, num_steps: int) -> list[float]:
        """Run optimizer steps and return the seconds of each."""
        step = self._step
        whole = max(num_micro_batches, step.strategy.gradient_accumulation_steps)
        step.strategy = replace(step.strategy, gradient_accumulation_steps=whole)
        step.most_micro_batches, step.num_steps = num_micro_batches, num_steps
        self._clock.start()
        run_steps(step)
        return list(self._clock.seconds)

    def count_real(self) -> float:
        """Return the share of tokens that are no padding."""
        return count_real(self._step.make_inputs())


def plan_plain(request: Request, meter: Meter) -> PlainRun:
    """Return the plain loop of a request, its model and optimizer made.

    Raises:
        ProbeFailed: it asks for what only a trainer brings.
    """
    workload, strategy = request.plan.workload, request.plan.strategy
    _refuse(workload, strategy)
    device = find_device(request.on_cpu)
    model = load_model(request, device)
    checkpoint(model, strategy, workload.recipe.engine)
    model = wrap_ranks(adapt(model, workload.recipe).train(), strategy)
    make = fill_tokens(
        plan_inputs(workload, strategy, _unwrap(model)), workload.model.vocab_size, list_special(_unwrap(model).config)
    )

    def load() -> Mapping[str, Any]:
        return {name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in make().items()}

    clock = Clock(meter)
    step = plan_step(workload, strategy, model, load, clock, device_type=device.type)
    return PlainRun(step, clock, tuple(note_step(workload, strategy)))


def _refuse(workload: Workload, strategy: Strategy) -> None:
    asked = {
        f"layer kernels {strategy.layer_kernels}": strategy.layer_kernels != "none",
        f"loss kernel {strategy.loss_kernel}": strategy.loss_kernel != "dense",
        "activation offload": strategy.activation_offload, "compile": strategy.compile,
        "sequences that share a row": strategy.padding_free or workload.data.packing,
        "sharding": strategy.zero_stage > 0 or strategy.mesh.dp_shard > 1,
        f"optimizer {workload.recipe.optimizer}": is_from_bitsandbytes(find_optimizer(workload.recipe.optimizer).name),
        "training on pairs": workload.recipe.preference is not None,
    }
    for what, found in asked.items():
        if found:
            name = workload.recipe.engine.name
            advice = "name your own trainer with --script train.py:make_trainer"
            raise ProbeFailed(f"{what}: a trial of {name} has none by itself; {advice}")


def wrap_ranks(model: torch.nn.Module, strategy: Strategy) -> torch.nn.Module:
    """Return the model in DDP where the run has several ranks."""
    if strategy.mesh.data_parallel_size == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(model)


def _unwrap(model: torch.nn.Module) -> Any:
    inner = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner

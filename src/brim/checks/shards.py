"""A small model's gradient on two gloo ranks, replicated or sharded, as the loop on GPUs does it."""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brim.checks.gradients import flatten
from brim.checks.knobs import list_knobs, pick_forms
from brim.checks.loops import own_loss, wrap
from brim.errors import ProbeFailed
from brim.spec.recipe import Recipe
from brim.spec.strategy import Strategy

NUM_RANKS = 2
_LONGEST_SECONDS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One gradient that is wanted."""

    strategy: Strategy
    """How the ranks are to run."""
    batches: tuple[Mapping[str, Tensor], ...]
    """One micro-batch for each rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What every rank is given; its parent process pickled it."""

    model: nn.Module
    """The small model."""
    rows: Sequence[Any]
    """The sequences that the micro-batches are made of."""
    runs: tuple[Run, ...]
    """The gradients that are wanted."""
    recipe: Recipe | None = None
    """The workload's recipe."""


def differentiate_on_ranks(shared: Shared) -> list[Tensor | str]:
    """Return the mean gradient of the ranks under each run's strategy, or why there is none.

    Raises:
        ProbeFailed: the ranks died, or gave no answer in five minutes.
    """
    from torch.multiprocessing.spawn import ProcessException, start_processes

    with tempfile.TemporaryDirectory(prefix="brim-verify-") as folder:
        out = os.path.join(folder, "gradients")
        try:
            given = (folder, pickle.dumps(shared))
            ranks = start_processes(_run_rank, given, nprocs=NUM_RANKS, join=False, start_method="spawn")
            _wait(ranks)
        except (ProcessException, RuntimeError, OSError, AttributeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ProbeFailed(f"{NUM_RANKS} ranks gave no answer: {(lines or ['no output'])[-1][:300]}") from None
        return torch.load(out, weights_only=True)


def _wait(ranks: Any) -> None:
    """Wait for the ranks, or end them when they take too long."""
    last = time.monotonic() + _LONGEST_SECONDS
    while not ranks.join(timeout=5):
        if time.monotonic() > last:
            for process in ranks.processes:
                process.kill()
            raise ProbeFailed(f"{NUM_RANKS} ranks gave no answer in {_LONGEST_SECONDS} seconds")


def _run_rank(rank: int, folder: str, given: bytes) -> None:
    """Write what rank 0 has at the end; the others only take part. What libraries say goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    import torch.distributed as dist

    shared: Shared = pickle.loads(given)
    _introduce(shared.model)
    torch.set_num_threads(1)
    meeting = f"file://{os.path.join(folder, 'meeting')}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=NUM_RANKS)
    try:
        found = [_answer(shared, run, rank) for run in shared.runs]
        if rank == 0:
            torch.save(found, os.path.join(folder, "gradients"))
    finally:
        dist.destroy_process_group()


def _introduce(model: nn.Module) -> None:
    """Make one model of the class in this process: transformers 5 notes then which outputs, such as router logits, its
    layers record, and a model that only arrives has no note. Source: transformers modeling_utils.py
    PreTrainedModel.__init__, _CAN_RECORD_REGISTRY."""
    if hasattr(model, "config"):
        type(model)(copy.deepcopy(model.config))


def _answer(shared: Shared, run: Run, rank: int) -> Tensor | str:
    try:
        return _differentiate(shared, run, rank)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _differentiate(shared: Shared, run: Run, rank: int) -> Tensor:
    model = copy.deepcopy(shared.model).train()
    knobs = pick_forms(list_knobs(run.strategy, model, shared.rows, shared.recipe))
    called: nn.Module = model
    loss_of: Callable[[nn.Module, Any], Tensor] = own_loss
    for knob in knobs:
        called, loss_of = knob.prepare(called), knob.loss_of or loss_of
    called = shard(called, run.strategy.zero_stage)
    with ExitStack() as stack:
        for knob in knobs:
            stack.enter_context(knob.around())
        loss_of(called, run.batches[rank]).backward()
    return flatten(parameter for parameter in model.parameters() if parameter.requires_grad)


def shard(model: nn.Module, zero_stage: int) -> nn.Module:
    """Return the model replicated (stages 0 and 1), or sharded layer by layer with parameters gathered for the whole
    step (2) or whenever they are used (3)."""
    if zero_stage < 2:
        return wrap(model, "ddp")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    for layer in _list_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=zero_stage == 3)
    return fully_shard(model, mesh=mesh, reshard_after_forward=zero_stage == 3)


def _list_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a model: what its outermost lists hold, and not, say, experts that a rank may not use."""
    if isinstance(module, nn.ModuleList):
        return [layer for layer in module if any(True for _ in layer.parameters())]
    return [layer for child in module.children() for layer in _list_layers(child)]

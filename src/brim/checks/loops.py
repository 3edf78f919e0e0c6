"""Subjects that a loop written out trains: plain PyTorch and Accelerate, as their guides show them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from brim.checks.accumulation import WINDOW, Inputs, Split, Subject
from brim.checks.fsdp2 import sharding_on_cpu
from brim.checks.gradients import CaptureOptimizer, flatten
from brim.checks.small import copy_model
from brim.checks.trainers import list_versions, place_of

PLAIN_FIX = "for micro in brim.accumulate(batch, micro_batch_size, model=model): micro.backward(...)"
ACCELERATE_FIX = "with brim.exact_accelerate(accelerator, model, loader) as batches: for batch in batches: ..."

Accumulate = Callable[..., Iterator[Any]]


def own_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the loss that a model of transformers computes itself."""
    return model(**inputs).loss


def plain_subject(
    model: nn.Module, rows: Sequence[Any], collate: Callable[[list[Any]], Inputs], *,
    accumulate: Accumulate | None = None, num_ranks: int = 1, sharding: str = "ddp",
) -> Subject:  # fmt: skip
    """Return a plain loop as a subject: `loss / steps` as it is usually written, or `accumulate` given as a value.

    Args:
        model: small, on the CPU.
        rows: sequences. collate: makes a micro-batch of them.
        accumulate: `brim.accumulate`, or None for the stock loop.
        num_ranks: data-parallel ranks; this process is one of them and in their process group.
        sharding: ddp or fsdp2, where there are several ranks.
    """

    def run(split: Split) -> list[Tensor]:
        module = wrap(copy_model(model).train(), sharding if num_ranks > 1 else None)
        steps = []
        for start in range(0, len(rows), WINDOW):
            window = list(rows[start : start + WINDOW])
            size = split.micro_batch_size
            batches = [collate(window[at : at + size]) for at in range(0, len(window), size)]
            mine = batches[_rank() :: num_ranks] or batches[-1:]
            module.zero_grad(set_to_none=True)
            if accumulate is None:
                for inputs in mine:
                    (own_loss(module, inputs) / split.accumulation_steps).backward()
            else:
                for micro in accumulate(mine, model=module):
                    micro.backward(own_loss(module, micro.inputs))
            steps.append(flatten(p for p in module.parameters() if p.requires_grad))
        return steps

    return Subject(
        name=f"{type(model).__name__} in a plain loop{place_of(num_ranks, sharding)}", model=model, rows=rows,
        collate=collate, loss_of=own_loss, run=run, fix=PLAIN_FIX, num_ranks=num_ranks, versions=list_versions(),
    )  # fmt: skip


def wrap(module: nn.Module, sharding: str | None) -> nn.Module:
    """Return a module in DistributedDataParallel, sharded by FSDP2, or as it is."""
    if sharding == "ddp":
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
    if sharding == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        return fully_shard(module, mesh=mesh)
    return module


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def accelerate_subject(
    model: nn.Module, rows: Sequence[Any], collate: Callable[[list[Any]], Inputs], *,
    exactly: Callable[..., Any] | None = None, num_ranks: int = 1, sharding: str = "ddp",
) -> Subject:  # fmt: skip
    """Return Accelerate's documented loop as a subject.

    Args:
        model: small, on the CPU.
        rows: sequences. collate: makes a micro-batch of them.
        exactly: the context manager that makes the loop exact, or None for the stock loop.
        num_ranks: data-parallel ranks; this process is one of them and in their process group.
        sharding: ddp or fsdp2, where there are several ranks.
    """

    def run(split: Split) -> list[Tensor]:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=split.accumulation_steps, kwargs_handlers=[unused]
        )
        module = copy_model(model).train()
        optimizer = CaptureOptimizer(p for p in module.parameters() if p.requires_grad)
        loader = torch.utils.data.DataLoader(list(rows), batch_size=split.micro_batch_size, collate_fn=collate)
        with sharding_on_cpu(accelerator, module) if shards else nullcontext():
            prepared, stepper, loader = accelerator.prepare(module, optimizer, loader)
            with nullcontext(loader) if exactly is None else exactly(accelerator, prepared, loader) as batches:
                _train(accelerator, prepared, stepper, batches)
        accelerator.free_memory()
        return optimizer.captured

    shards = num_ranks > 1 and sharding == "fsdp2"
    return Subject(
        name=f"{type(model).__name__} in an Accelerate loop{place_of(num_ranks, sharding)}", model=model, rows=rows,
        collate=collate, loss_of=own_loss, run=run, fix=ACCELERATE_FIX, num_ranks=num_ranks, versions=list_versions(),
    )  # fmt: skip


def _train(accelerator: Any, model: Any, optimizer: Any, batches: Any) -> None:
    for inputs in batches:
        with accelerator.accumulate(model):
            accelerator.backward(own_loss(model, inputs))
            optimizer.step()
            optimizer.zero_grad()

"""Subjects that a loop written out trains: plain PyTorch and Accelerate, as their guides show them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brim.checks.accumulation import WINDOW, Inputs, Split, Subject
from brim.checks.gradients import CaptureOptimizer, flatten
from brim.checks.small import copy_model
from brim.checks.trainers import list_versions

PLAIN_FIX = "for micro in brim.accumulate(batch, micro_batch_size, model=model): micro.backward(...)"
ACCELERATE_FIX = "with brim.exact_accelerate(accelerator, model, loader) as batches: for batch in batches: ..."

Accumulate = Callable[..., Iterator[Any]]


def own_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the loss that a model of transformers computes itself."""
    return model(**inputs).loss


def plain_subject(
    model: nn.Module, rows: Sequence[Any], collate: Callable[[list[Any]], Inputs], *,
    accumulate: Accumulate | None = None, loss_of: Callable[[nn.Module, Inputs], Tensor] = own_loss,
) -> Subject:  # fmt: skip
    """Return a plain loop as a subject: `loss / steps` as it is usually written, or `accumulate` given as a value."""

    def run(split: Split) -> list[Tensor]:
        module = copy_model(model).train()
        steps = []
        for start in range(0, len(rows), WINDOW):
            window = list(rows[start : start + WINDOW])
            size = split.micro_batch_size
            batches = [collate(window[at : at + size]) for at in range(0, len(window), size)]
            module.zero_grad(set_to_none=True)
            if accumulate is None:
                for inputs in batches:
                    (loss_of(module, inputs) / split.accumulation_steps).backward()
            else:
                for micro in accumulate(batches, model=module, loss=lambda inputs: loss_of(module, inputs)):
                    micro.backward(loss_of(module, micro.inputs))
            steps.append(flatten(p for p in module.parameters() if p.requires_grad))
        return steps

    return Subject(
        name=f"{type(model).__name__} in a plain loop", model=model, rows=rows, collate=collate, loss_of=loss_of,
        run=run, fix=PLAIN_FIX, versions=list_versions(),
    )  # fmt: skip


def accelerate_subject(
    model: nn.Module, rows: Sequence[Any], collate: Callable[[list[Any]], Inputs], *,
    exactly: Callable[..., Any] | None = None,
) -> Subject:  # fmt: skip
    """Return Accelerate's documented loop as a subject; `exactly` is the context manager that makes it exact."""

    def run(split: Split) -> list[Tensor]:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=split.accumulation_steps)
        module = copy_model(model).train()
        optimizer = CaptureOptimizer(p for p in module.parameters() if p.requires_grad)
        loader = torch.utils.data.DataLoader(list(rows), batch_size=split.micro_batch_size, collate_fn=collate)
        prepared, stepper, loader = accelerator.prepare(module, optimizer, loader)
        if exactly is None:
            _train(accelerator, prepared, stepper, loader)
        else:
            with exactly(accelerator, prepared, loader) as batches:
                _train(accelerator, prepared, stepper, batches)
        accelerator.free_memory()
        return optimizer.captured

    return Subject(
        name=f"{type(model).__name__} in an Accelerate loop", model=model, rows=rows, collate=collate, loss_of=own_loss,
        run=run, fix=ACCELERATE_FIX, versions=list_versions(),
    )  # fmt: skip


def _train(accelerator: Any, model: Any, optimizer: Any, batches: Any) -> None:
    for inputs in batches:
        with accelerator.accumulate(model):
            accelerator.backward(own_loss(model, inputs))
            optimizer.step()
            optimizer.zero_grad()

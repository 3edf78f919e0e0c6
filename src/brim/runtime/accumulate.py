"""Exact accumulation in a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from brim.errors import InvalidInput
from brim.losses.form import AuxiliaryTap, LossForm, list_coefficients
from brim.losses.measure import measure_form
from brim.losses.rules import count_rows
from brim.runtime.ranks import is_distributed, reduce_unused, share_inputs
from brim.runtime.window import Window, open_window

Inputs = Mapping[str, Any]

_FORMS: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], LossForm]] = WeakKeyDictionary()
"""Forms already measured: a memo of what the module would answer again."""


@dataclass(slots=True, kw_only=True)
class Micro:
    """One micro-batch of a window."""

    inputs: Inputs
    """Keyword arguments of the model."""
    index: int
    """Which micro-batch of the window, from 0."""
    window: Window
    """The window it belongs to."""
    auxiliary: AuxiliaryTap | None = None
    """Where the model's auxiliary losses are read from; None if it adds none."""
    loss: float | Tensor = 0.0
    """Its share of the window's loss after `backward`: shares add up to the mean over the whole batch of this rank's
    part, times the number of ranks, so that their average over ranks is the loss of the batch."""

    def backward(self, loss: Tensor, scaler: Any = None) -> None:
        """Run backward from the loss of this micro-batch, weighted so that the window's gradient is the big batch's.

        Args:
            loss: what the model returned for `inputs`, not scaled by anybody.
            scaler: a `torch.amp.GradScaler`; clip after `scaler.unscale_`, once the window is over.
        """
        parts = self.auxiliary.take() if self.auxiliary is not None else {}
        share = self.window.scale(self.index, loss, parts)
        self.loss = share.detach()
        (share if scaler is None else scaler.scale(share)).backward()


def accumulate(
    batch: Inputs | Sequence[Inputs], micro_batch_size: int | None = None, *, model: nn.Module,
    loss: Callable[[Inputs], Tensor] | None = None, form: LossForm | None = None, reduce_each: bool = False,
    group: Any = None,
) -> Iterator[Micro]:  # fmt: skip
    """Yield the micro-batches of one optimizer step; their gradients add up to the big batch's, exactly.

        for micro in brim.accumulate(batch, 4, model=model):
            micro.backward(model(**micro.inputs).loss)
        optimizer.step()
        optimizer.zero_grad()

    What the loss averages over is measured once for each model. Under DDP and FSDP2 gradients are reduced with the last
    micro-batch; ranks may hold different numbers of sequences: the one with fewer repeats its last micro-batch with
    weight 0, so that no rank waits for another.

    Args:
        batch: keyword arguments of the model with rows first, or the micro-batches themselves, already collated.
        micro_batch_size: rows per micro-batch; leave it out where `batch` is a list of micro-batches.
        model: the module, wrapped or not.
        loss: returns the loss of a micro-batch, where it is not `model(**inputs).loss`.
        form: what the loss averages over, where it is known; measured if None.
        reduce_each: reduce gradients after every micro-batch: slower, and keeps no unsharded gradient under FSDP2.
        group: data-parallel process group; the default one if None.

    Raises:
        InvalidInput: a micro-batch size that does not go with the batch, or no micro-batch at all on any rank.
        InseparableLoss: the loss is no weighted mean of its micro-batches' losses.
    """
    micro_batches = split_batch(batch, micro_batch_size)
    form = form or measure_model(model, loss, micro_batches, batch, group)
    window = open_window(form, micro_batches, find_device(model), group)
    tap = AuxiliaryTap(unwrap_model(model)) if form.auxiliary else None
    try:
        for index in range(window.most_micro_batches):
            inputs = micro_batches[min(index, len(micro_batches) - 1)]
            last = index == window.most_micro_batches - 1
            with reducing(model, reduce_each or last):
                yield Micro(inputs=window.prepare(index, inputs), index=index, window=window, auxiliary=tap)
    finally:
        if tap is not None:
            tap.remove()


def split_batch(batch: Inputs | Sequence[Inputs], size: int | None) -> list[Inputs]:
    """Return the micro-batches of a batch."""
    if not isinstance(batch, Mapping):
        if size is not None:
            raise InvalidInput("micro_batch_size goes with one batch; these are micro-batches already")
        if not batch:
            raise InvalidInput("no micro-batch; give every rank at least one (its labels may all be -100)")
        return list(batch)
    if size is None or isinstance(size, bool) or size < 1:
        raise InvalidInput(f"micro_batch_size must be 1 or more rows, not {size}")
    rows = count_rows(batch)
    return [_cut(batch, rows, start, start + size) for start in range(0, rows, size)]


def _cut(batch: Inputs, rows: int, start: int, stop: int) -> Inputs:
    """Return some rows of a batch; what has another first dimension is no per-row input and stays whole."""

    def cut(value: Any) -> Any:
        per_row = isinstance(value, Tensor) and value.dim() and value.shape[0] == rows
        return value[start:stop] if per_row else value

    return {key: cut(value) for key, value in batch.items()}


def measure_model(
    model: nn.Module, loss: Callable[[Inputs], Tensor] | None, micro_batches: Sequence[Inputs], batch: Any, group: Any
) -> LossForm:
    """Return the form of a model's loss, measured on the first call for inputs of these names.

    Ranks must agree on whether it is measured, so among several ranks the names, which may differ, do not count.
    """
    module = unwrap_model(model)
    forms = _FORMS.setdefault(module, {})
    names = tuple(sorted(micro_batches[0])) if micro_batches and not is_distributed() else ()
    key = (names, *identify_loss(loss))
    if key not in forms:
        sample = batch if isinstance(batch, Mapping) else next(iter(micro_batches), None)
        sample = share_inputs(sample, find_device(model), group)
        if sample is None:
            raise InvalidInput("no micro-batch to measure the loss on; rank 0 needs one in the first window")
        declared = list_coefficients(getattr(module, "config", None))
        forms[key] = measure_form(loss or _own_loss(module), module, sample, coefficients=declared)
    return forms[key]


def identify_loss(loss: Callable[[Inputs], Tensor] | None) -> tuple[Any, ...]:
    """Return what tells a loss from another of the same model without keeping either alive.

    A function made anew in every step is the same one: its code and what it closes over are, not its address, which
    the next function may get.
    """
    code = getattr(loss, "__code__", None)
    if code is None:
        return (repr(loss),)
    cells = [cell.cell_contents for cell in getattr(loss, "__closure__", None) or () if _is_filled(cell)]
    plain = [cell for cell in cells if isinstance(cell, (bool, int, float, str))]
    return (code, repr(getattr(loss, "__defaults__", None)), *plain)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False


def _own_loss(module: nn.Module) -> Callable[[Inputs], Tensor]:
    def loss_of(inputs: Inputs) -> Tensor:
        found = getattr(module(**inputs), "loss", None)
        if found is None:
            raise InvalidInput(
                "the model returned no loss; pass labels, or loss=... with a function of a micro-batch's inputs"
            )
        return found

    return loss_of


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, or the module itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def find_device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def reducing(model: nn.Module, reduces: bool) -> AbstractContextManager[Any]:
    """Return the context of a micro-batch whose backward pass reduces gradients over ranks, or does not."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(reduces)
        reduce_unused(model)
        return nullcontext()
    return model.no_sync() if not reduces and hasattr(model, "no_sync") else nullcontext()

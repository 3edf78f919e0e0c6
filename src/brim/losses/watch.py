"""Watching a loss without touching the model: no gradient, and modes, buffers and random state put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from brim.losses.form import AuxiliaryTap
from brim.losses.rules import IGNORED
from brim.losses.tap import LossCall, LossTap
from brim.losses.views import Inputs, Parts

LossOf = Callable[[Inputs], Tensor]
PRECISE, COARSE = 5e-6, 3e-2
"""Relative difference of two losses that are the same number in fp32, and in 16 bit (measured noise floors: 5e-7 and
6e-3)."""
_SHORT = (torch.bfloat16, torch.float16)
_STIRRED_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One loss and what was seen of its making."""

    loss: float
    calls: Sequence[LossCall] = ()
    auxiliary: dict[str, float] = field(default_factory=dict)
    precise: float = PRECISE
    """Relative difference that counts as none between the loss and what the calls gave: no noise of kernels in it."""


class LossWatch:
    """Runs the loss without gradients in evaluation mode; module modes, random state and buffers are put back."""

    def __init__(self, loss_of: LossOf, model: nn.Module) -> None:
        self._loss_of, self.model = loss_of, model
        self._is_coarse = False
        self.ignored = IGNORED

    def __enter__(self) -> LossWatch:
        self._modes = {module: module.training for module in self.model.modules()}
        self._buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        self._random = torch.random.fork_rng(devices=devices)
        self._random.__enter__()
        self._tap = AuxiliaryTap(self.model)
        self.model.eval()
        return self

    def __exit__(self, *error: Any) -> None:
        self._tap.remove()
        for module, training in self._modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, kept in self._buffers:
                buffer.copy_(kept)
        self._random.__exit__(*error)

    def find_tolerance(self, inputs: Inputs) -> float:
        """Return the relative difference of two losses that counts as none, in the precision that they are made in.

        A trainer or a wrapped `forward` enters autocast by itself, so the dtypes of what is computed are looked at.
        """
        tf32 = torch.get_float32_matmul_precision() != "highest"
        self._is_coarse = tf32 or any(one.dtype in _SHORT for one in self.model.parameters())
        self.ignored = next((call.ignored for call in self.see(inputs).calls if call.ignored is not None), IGNORED)
        return COARSE if self._is_coarse else PRECISE

    def see(self, inputs: Inputs) -> Seen:
        """Return the loss of one batch."""
        copy = {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}
        self._tap.take()  # a batch that failed may have left its parts
        with torch.no_grad(), LossTap() as tap:
            loss = self._loss_of(copy)
        self._is_coarse |= tap.is_coarse
        auxiliary = {kind: float(value) for kind, value in self._tap.take().items()}
        precise = COARSE if loss.dtype in _SHORT else PRECISE
        return Seen(loss=float(loss), calls=tap.calls, auxiliary=auxiliary, precise=precise)

    def outer_coefficients(self, inputs: Inputs) -> dict[str, float]:
        """Return by how much the loss moves with each auxiliary output: what is added outside the model."""
        seen, found = self.see(inputs), {}
        for kind, value in seen.auxiliary.items():
            self._tap.push = (kind, amount := 1000.0 * max(abs(value), 1.0))
            found[kind] = (self.see(inputs).loss - seen.loss) / amount
        self._tap.push = None
        return {kind: value for kind, value in found.items() if abs(value) > 1e-6}

    def see_parts(self, parts: Parts) -> list[Seen] | None:
        """Return the losses of a batch and its parts; None where its rows cannot be cut this way."""
        try:
            seen = [self.see(part) for part in parts.batches]
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError):
            return None
        return seen if all(isfinite(one.loss) for one in seen) else None


@contextmanager
def stirred(model: nn.Module, factor: float, most_bytes: int = _STIRRED_BYTES) -> Iterator[None]:
    """Change the smallest trained tensors while entered, and put them back to the bit.

    Args:
        model: the module; a sharded one is changed alike on every rank.
        factor: what they are multiplied by: above 1 a model is surer of what it says, below 1 less.
        most_bytes: what the kept copies may take.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    trained = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel())
    with torch.no_grad():
        for parameter in trained:
            most_bytes -= parameter.numel() * parameter.element_size()
            if most_bytes < 0 and kept:
                break
            kept.append((parameter, parameter.detach().clone()))
            parameter.mul_(factor).add_(0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in kept:
                parameter.copy_(before)

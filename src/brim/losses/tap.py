"""The loss tap: what torch's own loss functions were seen to average over while a model computed its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCall:
    """One call of a loss function."""

    num_terms: float
    """Terms that a mean divides by (their weights, where classes are weighted)."""
    value: float
    """The mean over them, also where the call itself returned a sum."""
    ignored: int | None
    """Target that it left out."""


class LossTap(TorchFunctionMode):
    """While entered, `calls` grows by what each of torch's loss functions averaged over.

    `is_coarse` turns true once anything is computed in 16 bit, by whichever context it was asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self.is_coarse = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.is_coarse |= isinstance(result, Tensor) and result.dtype in (torch.bfloat16, torch.float16)
        count = _COUNTS.get(func)
        if count is not None and isinstance(result, Tensor):
            self._record(count(*args, **kwargs), result, kwargs)
        return result

    def _record(self, num_terms: float, result: Tensor, kwargs: dict[str, Any]) -> None:
        total = float(result.detach().double().sum())
        mean = total if result.dim() == 0 and kwargs.get("reduction", "mean") != "sum" else total / max(num_terms, 1)
        self.calls.append(LossCall(num_terms=num_terms, value=mean, ignored=kwargs.get("ignore_index")))


def _count_classes(
    scores: Tensor, target: Tensor, weight: Tensor | None = None, size_average: Any = None, ignore_index: int = -100,
    *_: Any, **__: Any,
) -> float:  # fmt: skip
    if target.is_floating_point():  # probabilities: one term per row of scores
        return scores.numel() / scores.shape[1 if scores.dim() > 1 else 0]
    counted = target[target != ignore_index]
    return float(counted.numel() if weight is None else weight[counted].sum())


def _count_elements(scores: Tensor, *_: Any, **__: Any) -> float:
    return float(scores.numel())


def _count_rows(scores: Tensor, target: Tensor, input_lengths: Any, *_: Any, **__: Any) -> float:
    return float(len(input_lengths))


_COUNTS: dict[Callable[..., Any], Callable[..., float]] = {
    F.cross_entropy: _count_classes,
    F.nll_loss: _count_classes,
    F.mse_loss: _count_elements,
    F.l1_loss: _count_elements,
    F.smooth_l1_loss: _count_elements,
    F.huber_loss: _count_elements,
    F.binary_cross_entropy: _count_elements,
    F.binary_cross_entropy_with_logits: _count_elements,
    torch.nn.functional.ctc_loss: _count_rows,
}

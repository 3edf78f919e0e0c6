"""Gradients as one vector: captured inside `optimizer.step()`, or made by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_LARGEST_WHOLE = 2**22
"""Elements of a gradient that is kept whole."""
_PLACES = 2**14


class CaptureOptimizer(torch.optim.SGD):
    """Keeps what it is given to step with and moves no weight: every optimizer step sees the same model.

    Norms are not clipped away: clip with a limit that is never reached.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(list(parameters), lr=0.0)
        self.captured: list[Tensor] = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Keep the gradients of all parameters as one fp64 vector."""
        loss = None if closure is None else closure()
        self.captured.append(flatten(parameter for group in self.param_groups for parameter in group["params"]))
        return loss


def flatten(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the gradients of parameters as one fp64 vector on the host; 0 where there is none, shards gathered.

    A large tensor is sketched: signs drawn once for all are put on its elements and they are added up in some thousand
    places. That is linear and keeps norms and angles to about a percent, errors in proportion.
    """
    parts = []
    for parameter in parameters:
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        parts.append(_sketch(whole.detach().flatten()).to("cpu", torch.float64))
    return torch.cat(parts)


def _sketch(values: Tensor) -> Tensor:
    if values.numel() <= _LARGEST_WHOLE:
        return values
    rows = -(-values.numel() // _PLACES)
    padded = torch.zeros(rows * _PLACES, dtype=torch.float32, device=values.device)
    generator = torch.Generator(device=values.device).manual_seed(values.numel())
    signs = torch.randint(0, 2, values.shape, generator=generator, device=values.device, dtype=torch.int8)
    padded[: values.numel()] = values.float() * (2 * signs - 1)
    return padded.view(rows, _PLACES).sum(0, dtype=torch.float64)


def differentiate(model: nn.Module, loss_of: Callable[[nn.Module, Mapping[str, Any]], Tensor], inputs: Any) -> Tensor:
    """Return the gradient of one loss by plain autograd; the model's own gradients are left empty."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, inputs)
    if torch.isfinite(loss):
        loss.backward()
    found = flatten(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.zero_grad(set_to_none=True)
    return found


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Return the norm of the difference over the norm of the truth, over all parameters together."""
    size = float(truth.norm())
    return float((found - truth).norm()) / size if size else float(found.norm())


def compare_gradients(found: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Return the relative error, the ratio of the norms and the cosine of the angle; 0 where a norm is 0."""
    sizes = float(found.norm()), float(truth.norm())
    cosine = float(found @ truth) / (sizes[0] * sizes[1]) if all(sizes) else 0.0
    return relative_error(found, truth), sizes[0] / sizes[1] if sizes[1] else 0.0, cosine

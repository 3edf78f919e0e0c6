"""The form of a loss: what it averages over, and which auxiliary parts are added to that mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from brim.losses.rules import CountingRule

AUXILIARY_KINDS = ("aux_loss", "z_loss")
"""How transformers' outputs name router losses. Source: transformers/modeling_outputs.py (`aux_loss`, `z_loss`,
`encoder_aux_loss`, ...)."""

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef", "aux_loss_alpha")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossForm:
    """`loss = mean over the rule's terms + sum of coefficient x auxiliary part`."""

    rule: CountingRule
    """What the mean averages over."""
    reduction: Literal["mean", "sum"] = "mean"
    """`sum` for a loss that is never divided."""
    auxiliary: tuple[tuple[str, float], ...] = ()
    """Kind and coefficient of each part that depends on the micro-batch as a whole, such as a router's balance."""

    def __str__(self) -> str:
        text = f"{self.reduction} over {self.rule}"
        return text + "".join(f" + {coefficient:g} x {kind}" for kind, coefficient in self.auxiliary)

    def sum_auxiliary(self, parts: Mapping[str, Tensor]) -> Tensor | float:
        """Return the auxiliary part of a loss, coefficients applied; 0.0 if there is none."""
        found = [coefficient * parts[kind] for kind, coefficient in self.auxiliary if kind in parts]
        return sum(found[1:], start=found[0]) if found else 0.0


def read_auxiliary(outputs: Any) -> dict[str, Tensor]:
    """Return the auxiliary losses that a model's outputs show, summed by kind."""
    found: dict[str, Tensor] = {}
    for name, value in outputs.items() if isinstance(outputs, Mapping) else ():
        for kind in AUXILIARY_KINDS:
            if name.endswith(kind) and isinstance(value, Tensor) and value.dim() == 0:
                found[kind] = found[kind] + value if kind in found else value
    return found


def list_coefficients(*places: Any) -> list[float]:
    """Return the coefficients of auxiliary losses that configs or other objects declare; a place may be None."""
    inner = [getattr(place, name, None) for place in places for name in ("text_config", "decoder", "llm_config")]
    found = [getattr(place, name, None) for place in (*places, *inner) for name in _COEFFICIENTS]
    return [float(value) for value in found if isinstance(value, (int, float)) and value]


def _push(outputs: Any, kind: str, amount: float) -> None:
    """Add an amount to the first auxiliary loss of a kind: what the training loss moves by shows its coefficient."""
    name = next((name for name in outputs if name.endswith(kind) and isinstance(outputs[name], Tensor)), None)
    if name is not None:
        outputs[name] = outputs[name] + amount


class AuxiliaryTap:
    """Keeps the auxiliary losses of a module's last forward pass, with their graph.

    The module's own outputs are read, so it works where the trainer, not the model, adds them up.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts: dict[str, Tensor] = {}
        self.push: tuple[str, float] | None = None
        self._handle = module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if torch.is_grad_enabled() or not self.parts:  # a reference pass without gradients does not replace it
            self.parts = read_auxiliary(outputs)
        if self.push is not None and isinstance(outputs, Mapping):
            _push(outputs, *self.push)

    def take(self) -> dict[str, Tensor]:
        """Return the parts and let go of them, so that no graph outlives its micro-batch."""
        parts, self.parts = self.parts, {}
        return parts

    def remove(self) -> None:
        """Take the hook off the module."""
        self._handle.remove()

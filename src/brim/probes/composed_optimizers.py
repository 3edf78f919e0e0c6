"""Optimizers made of others, which behave as one: Muon beside AdamW, and any optimizer on fp32 master weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class SideBySide(torch.optim.Optimizer):
    """Optimizers of different parameters, stepped one after another."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        """Take over the optimizers; none of them is copied."""
        self.parts = tuple(parts)
        self.defaults = self.parts[0].defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Groups of all parts, in order."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:  # type: ignore[override]
        """States of all parts by parameter; a new mapping of the very states."""
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every part."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free or zero the gradients of every part."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


class MasterWeights(torch.optim.Optimizer):
    """An optimizer that updates fp32 copies of the weights, with fp32 states, from fp32 gradients.

    Each gradient is freed once its fp32 copy is made; a gradient in fp32 is used as it is. The copies of the gradients
    live until the weights are written back.

    Source: megatron/core/optimizer/optimizer.py Float16OptimizerWithFloat16Params (_copy_model_grads_to_main_grads,
    _copy_main_params_to_model_params); deepspeed runtime/bf16_optimizer.py and runtime/fp16/fused_optimizer.py hold as
    much when they step, in one tensor per group.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], make: MakeOptimizer) -> None:
        """Make no copy yet: call `start` where the memory is watched, or leave it to the first step.

        Args:
            groups: groups of the model's own parameters.
            make: returns the optimizer of the same groups with the copies in place of the parameters.
        """
        self.param_groups = [dict(group) for group in groups]
        self.masters: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        self.inner: torch.optim.Optimizer | None = None
        self._make = make

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:  # type: ignore[override]
        """States by the model's own parameter, the copy among them; a new mapping."""
        states = self.inner.state if self.inner is not None else {}
        return {one: {"master": master, **states.get(master, {})} for one, master in self.masters.items()}

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Settings of the optimizer inside."""
        return self.start().defaults

    @torch.no_grad()
    def start(self) -> torch.optim.Optimizer:
        """Return the optimizer inside, made with the copies if they are not there yet."""
        if self.inner is None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    copied = parameter.detach().to(torch.float32, copy=True)
                    self.masters[parameter] = torch.nn.Parameter(copied)
            self.inner = self._make([
                {**group, "params": [self.masters[one] for one in group["params"]]} for group in self.param_groups
            ])  # fmt: skip
        return self.inner

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the copies and write them back."""
        inner = self.start()
        for parameter, master in self.masters.items():
            if parameter.grad is not None:
                master.grad = parameter.grad.float()
                parameter.grad = None
        inner.step()
        for parameter, master in self.masters.items():
            parameter.copy_(master)
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing is left to zero: `step` has freed every gradient."""

"""What is recomputed in the backward pass: nothing, or whole layers."""

from __future__ import annotations

import torch

from brim.errors import ProbeFailed
from brim.spec.recipe import Engine
from brim.spec.strategy import Strategy


def checkpoint(model: torch.nn.Module, strategy: Strategy, engine: Engine) -> None:
    """Switch on the strategy's activation checkpointing, as the trainer does.

    Raises:
        ProbeFailed: the model has no checkpointing of its own.
    """
    if strategy.activation_checkpointing == "full":
        _checkpoint(model, reentrant=engine.reentrant_checkpointing)


def _checkpoint(model: torch.nn.Module, *, reentrant: bool) -> None:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        name = type(model).__name__
        raise ProbeFailed(f"{name} has no gradient_checkpointing_enable; trace it with activation checkpointing none")
    enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

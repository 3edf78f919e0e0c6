"""The optimizer of a recipe over a model's trained parameters."""

from __future__ import annotations

import torch

from brim.errors import ProbeFailed
from brim.spec.recipe import Recipe
from brim.spec.strategy import Strategy


def make_optimizer(model: torch.nn.Module, recipe: Recipe, strategy: Strategy) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters, in the kernel asked for.

    Raises:
        ProbeFailed: nothing trains.
    """
    kernel = strategy.optimizer_kernel
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ProbeFailed("no parameter of the model trains; check the adapter's target modules")
    return torch.optim.AdamW(trained, lr=1e-5, foreach=kernel == "foreach", fused=kernel == "fused")

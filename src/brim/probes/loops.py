"""What training loops do around the model and the optimizer, by the name of the trainer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from brim.spec.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A training loop."""

    holds_batches: bool = False
    """Whether all micro-batches of an optimizer step are on the device at once, rather than one."""
    counts_labels: bool = False
    """Whether the number of labels of the whole batch goes to the model, whose loss is divided by it."""
    casts_outputs: bool = False
    """Whether the model's output is copied to fp32 under autocast."""
    clips: bool = False
    """Whether gradients are clipped to a norm."""
    keeps_loss: bool = False
    """Whether the loss of a micro-batch stays until that of the next one."""


PLAIN = Loop()
"""model(**batch).loss.backward(), optimizer.step(), optimizer.zero_grad()."""
ACCELERATE = Loop(casts_outputs=True)
"""Source: accelerate accelerator.py prepare_model, backward; data_loader.py DataLoaderShard.__iter__: what it fetches
ahead is still on the host."""
TRAINER = Loop(holds_batches=True, counts_labels=True, casts_outputs=True, clips=True, keeps_loss=True)
"""Source: transformers trainer.py _inner_training_loop, get_batch_samples, training_step, compute_loss;
`max_grad_norm` of TrainingArguments is 1.0. TRL's and Unsloth's trainers inherit it."""
PREFERENCES = Loop(holds_batches=True, casts_outputs=True, clips=True, keeps_loss=True)
"""Source: trl trainer/dpo_trainer.py: batches hold no labels, so none are counted."""

_WITHOUT_TRAINER = ("plain", "lit", "torchtune", "torchtitan", "megatron", "peft")


def find_loop(recipe: Recipe) -> Loop:
    """Return the loop of a recipe's engine; one that is not known by name is taken for the HF Trainer's."""
    name = recipe.engine.name.lower()
    if name.startswith("accelerate"):
        return ACCELERATE
    if recipe.preference is not None:
        return PREFERENCES
    return PLAIN if name.startswith(_WITHOUT_TRAINER) else TRAINER


def takes_label_count(model: Any) -> bool:
    """Whether a model's forward takes `num_items_in_batch`.

    Source: transformers trainer.py __init__, model_accepts_loss_kwargs.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    accepts = getattr(base, "accepts_loss_kwargs", None)
    if accepts is not None:
        return bool(accepts)
    parameters = inspect.signature(base.forward).parameters.values()
    return any(one.kind == inspect.Parameter.VAR_KEYWORD for one in parameters)


class LossScaler(torch.amp.GradScaler):
    """PyTorch's own for fp16, which never skips a step: whether a gradient overflowed is data.

    Source: torch/amp/grad_scaler.py; accelerate accelerator.py __init__ makes one for mixed precision fp16.
    """

    def _maybe_opt_step(self, optimizer: torch.optim.Optimizer, optimizer_state: Any, *args: Any, **kwargs: Any) -> Any:
        return optimizer.step(*args, **kwargs)


def make_scaler(recipe: Recipe, device_type: str = "cpu") -> LossScaler | None:
    """Return the scaler of the loss, None where the loop has none."""
    scales = recipe.autocast and recipe.compute_dtype == "fp16"
    return LossScaler(device_type) if scales else None

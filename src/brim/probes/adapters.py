"""Adapters as PEFT puts them on, without weights: LoRA and its variants."""

from __future__ import annotations

import torch

from brim.errors import MissingExtra
from brim.probes.dtypes import torch_dtype
from brim.spec.recipe import Lora, Recipe


def adapt(model: torch.nn.Module, recipe: Recipe) -> torch.nn.Module:
    """Return the model with the recipe's adapter around it, its parameters on the meta device.

    Raises:
        MissingExtra: peft is not installed.
    """
    return model if recipe.lora is None else _adapt(model, recipe.lora)


def _adapt(model: torch.nn.Module, lora: Lora) -> torch.nn.Module:
    try:
        import peft
    except ImportError:
        raise MissingExtra(package="peft", extra="trace", purpose="--by trace with LoRA") from None
    everything = lora.target_modules == ("all-linear",)
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.use_rslora,
        target_modules="all-linear" if everything else list(lora.target_modules),
    )  # fmt: skip
    with torch.device("meta"):
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=lora.dtype == "fp32")  # type: ignore
    if lora.dtype != "fp32":
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch_dtype(lora.dtype))
    return adapted

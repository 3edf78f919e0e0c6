"""The model of a plan as its trainer is given it: loaded, quantised, adapted."""

from __future__ import annotations

from typing import Any

import torch

from brim.errors import MissingExtra, ProbeFailed
from brim.exporters.words import ATTENTION, DTYPES, name_lora, name_quantization
from brim.spec.recipe import Recipe
from brim.trials.request import Request
from brim.trials.weights import load_random


def load_model(request: Request, device: torch.device) -> torch.nn.Module:
    """Return the model of a request with random weights on the device, quantised if asked, not adapted yet.

    Raises:
        ProbeFailed: transformers or bitsandbytes cannot build it here.
    """
    plan, recipe = request.plan, request.plan.workload.recipe
    if not request.config:
        raise ProbeFailed(f"{plan.workload.model.name} has no config.json to build it from; name a folder or hub id")
    loading: dict[str, Any] = {"attn_implementation": ATTENTION[plan.strategy.attention_kernel]}
    words = name_quantization(recipe.quantization, recipe.compute_dtype, recipe.engine.name)
    if words is not None:
        loading["quantization_config"] = _read_quantization(words)
    elif recipe.quantization is not None:
        kind = recipe.quantization.kind
        raise ProbeFailed(f"a base in {kind} cannot be made up; name your trainer with --script train.py:make_trainer")
    return load_random(request.config, plan.workload.model.architecture, recipe.weight_dtype, device, loading)


def _read_quantization(words: dict[str, Any]) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingExtra(package="bitsandbytes", extra="train", purpose="a trial of a quantised base") from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**words)


def find_lora(recipe: Recipe) -> Any:
    """Return the recipe's adapter as PEFT takes it; None without one.

    Raises:
        ProbeFailed: virtual tokens, which only a script of one's own puts on.
    """
    if recipe.method in ("prompt-tuning", "prefix-tuning"):
        raise ProbeFailed(f"a trial puts no {recipe.method} on by itself; name your own trainer with --script")
    words = name_lora(recipe.lora)
    if words is None:
        return None
    try:
        import peft
    except ImportError:
        raise MissingExtra(package="peft", extra="train", purpose="a trial of LoRA") from None
    words.pop("task_type")  # PEFT's own guess is right for every head
    return peft.LoraConfig(**words)


def adapt(model: torch.nn.Module, recipe: Recipe) -> torch.nn.Module:
    """Return the model under its adapter, as `transformers`' users put it on."""
    lora = find_lora(recipe)
    if lora is None:
        return model
    import peft

    if recipe.quantization is not None and recipe.quantization.upcast_rest:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, lora)
    cast_adapters(model, recipe)
    return model


def cast_adapters(model: torch.nn.Module, recipe: Recipe) -> None:
    """Hold adapters in the recipe's dtype, as exported scripts do where the libraries choose otherwise."""
    if recipe.lora is None:
        return
    dtype = getattr(torch, DTYPES[recipe.lora.dtype])
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def find_device(on_cpu: bool) -> torch.device:
    """Return where this process's model goes."""
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

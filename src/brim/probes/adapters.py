"""Adapters as PEFT puts them on, without weights: LoRA and DoRA, prompt tuning, prefix tuning."""

from __future__ import annotations

from typing import Any

import torch

from brim.errors import MissingExtra, ProbeFailed
from brim.probes.dtypes import torch_dtype
from brim.spec.recipe import Lora, Recipe

_VIRTUAL_TOKENS = 20
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
}  # fmt: skip


def adapt(model: torch.nn.Module, recipe: Recipe) -> torch.nn.Module:
    """Return the model with the recipe's adapter around it, its parameters on the meta device.

    Raises:
        MissingExtra: peft is not installed. ProbeFailed: PEFT does not do this on this model.
    """
    if recipe.method in ("prompt-tuning", "prefix-tuning"):
        return _prepend(model, recipe)
    return model if recipe.lora is None else _adapt(model, recipe.lora)


def _import_peft(method: str) -> Any:
    try:
        import peft
    except ImportError:
        raise MissingExtra(package="peft", extra="trace", purpose=f"--by trace with {method}") from None
    return peft


def _adapt(model: torch.nn.Module, lora: Lora) -> torch.nn.Module:
    peft = _import_peft("LoRA")
    from brim.probes.quantized import GptqLinear
    from brim.probes.quantized_lora import LORA_LAYERS

    if lora.use_dora and any(isinstance(module, GptqLinear) for module in model.modules()):
        raise ProbeFailed("DoRA over GPTQ: PEFT has no such layer; use LoRA, or a base in nf4 or int8")
    everything = lora.target_modules == ("all-linear",)
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.use_rslora, use_dora=lora.use_dora,
        target_modules="all-linear" if everything else list(lora.target_modules),
    )  # fmt: skip
    config._register_custom_module(LORA_LAYERS)
    with torch.device("meta"):
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=lora.dtype == "fp32")
    if lora.dtype != "fp32":
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch_dtype(lora.dtype))
    return adapted


def _prepend(model: torch.nn.Module, recipe: Recipe) -> torch.nn.Module:
    """Virtual tokens before the text, or before the keys and values of every layer."""
    peft = _import_peft(recipe.method)
    prefix = recipe.method == "prefix-tuning"
    if prefix and getattr(model, "is_gradient_checkpointing", False):
        raise ProbeFailed("prefix tuning with checkpointing: PEFT refuses it; trace it with checkpointing none")
    kind = peft.PrefixTuningConfig if prefix else peft.PromptTuningConfig
    config = kind(task_type=_find_task(model), num_virtual_tokens=recipe.num_virtual_tokens or _VIRTUAL_TOKENS)
    with torch.device("meta"):
        adapted = peft.get_peft_model(model, config)
        adapted.prompt_tokens = _Tokens(adapted.prompt_tokens)
    return adapted


class _Tokens(dict[str, torch.Tensor]):
    """Numbers of the virtual tokens by adapter, made when asked for: PEFT holds them in a plain dict on the host."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.arange(len(super().__getitem__(name)))


def _find_task(model: torch.nn.Module) -> str:
    """Return PEFT's name of what a model's head is for: it decides where labels of virtual tokens go."""
    name = type(model).__name__
    for ending, task in _TASKS.items():
        if name.endswith(ending):
            return task
    raise ProbeFailed(f"virtual tokens before {name}: PEFT needs a task; use a model whose name ends in ForCausalLM")

"""Which adapters of a model a package of kernels fuses with their matrices, and putting the fused functions there."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from brim.probes.adapter_kernels import FOAK, UNSLOTH, FusedLora, FusedLoraMlp, Projection, Scratch, Style
from brim.probes.fused_layers import is_gated_mlp
from brim.spec.recipe import Recipe
from brim.spec.strategy import Strategy
from brim.tables.read import find_kernels

_QKV, _OUT, _MLP = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj", "down_proj")
_ADAPTER_PARTS = ("lora_A", "lora_B", "base_layer")


def fuse_adapters(model: torch.nn.Module, recipe: Recipe, strategy: Strategy) -> None:
    """Fuse adapters with their frozen matrices where the strategy's package of kernels does.

    A group of matrices is fused when all of it is adapted; what is not stays with PEFT.

    Source: unsloth models/llama.py patch_peft_model (no bias, no DoRA, no fp32 base); fms-acceleration
    fms_acceleration_foak models/utils.py trigger_fused_ops.
    """
    kernels = find_kernels(strategy.layer_kernels)
    wanted = kernels.adapters == "always" or (kernels.adapters == "quantised" and recipe.quantization is not None)
    if recipe.lora is None or recipe.lora.use_dora or not wanted:
        return
    style = FOAK if kernels.name == "foak" else UNSLOTH
    # Source: unsloth kernels/fast_lora.py _matmul_lora_ext: with dropout no buffer is kept.
    scratch = Scratch() if style is UNSLOTH and not recipe.lora.dropout else None
    for module in model.modules():
        if is_gated_mlp(module) and _all_adapted(module, _MLP, style):
            module.forward = types.MethodType(_mlp_forward(style, scratch), module)  # type: ignore[method-assign]
        for names in (_QKV, _OUT):
            if _all_adapted(module, names, style):
                _share(module, names, style, scratch)


def _all_adapted(module: torch.nn.Module, names: tuple[str, ...], style: Style) -> bool:
    layers = [module._modules.get(name) for name in names]
    return all(layer is not None and _is_fusable(layer, style) for layer in layers)


def _is_fusable(layer: torch.nn.Module, style: Style) -> bool:
    if not all(hasattr(layer, part) for part in _ADAPTER_PARTS):
        return False
    base: Any = layer.base_layer
    wide = not hasattr(base, "dequantize") and base.weight.dtype == torch.float32
    return style is FOAK or (getattr(base, "bias", None) is None and not wide)


def _project_all(
    layers: list[Any], style: Style, scratch: Scratch | None
) -> tuple[tuple[Projection, ...], list[torch.Tensor]]:
    """Return the constants and the factors of adapted layers."""
    parts, factors = [], []
    for layer in layers:
        name = layer.active_adapters[0]
        dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
        parts.append(Projection(layer.base_layer, layer.scaling[name], dropout, scratch))
        factors += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    return tuple(parts), factors


def _share(module: torch.nn.Module, names: tuple[str, ...], style: Style, scratch: Scratch | None) -> None:
    """Let the first of the layers that is called compute them all; the others hand out what it made.

    Source: fms-acceleration fms_acceleration_foak models/utils.py _build_fused_forwards. Several of one input write its
    gradient over it; a single one does not (LoRA_W).
    """
    layers = [module._modules[name] for name in names]
    made: dict[str, torch.Tensor] = {}

    def answer(name: str) -> Callable[..., torch.Tensor]:
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            if not made:
                parts, factors = _project_all(layers, style, scratch)
                made.update(zip(names, FusedLora.apply(x, parts, style, len(names) > 1, *factors), strict=True))
            return made.pop(name)

        return forward

    for name, layer in zip(names, layers, strict=True):
        layer.forward = types.MethodType(answer(name), layer)  # type: ignore[union-attr, method-assign]


def _mlp_forward(style: Style, scratch: Scratch | None) -> Callable[..., torch.Tensor]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        parts, factors = _project_all([self._modules[name] for name in _MLP], style, scratch)
        return FusedLoraMlp.apply(x, parts, style, *factors)

    return forward

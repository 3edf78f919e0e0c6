"""Kernels the host starts for one micro-batch: what bounds small models and short sequences.

Counts are of device kernels (views and allocations are none), taken from transformers 5.23, peft 0.21 and torch 2.13
with a dispatch counter, per layer: Llama 38 forward and 71 backward; Qwen3 54 and 103; GPT-2 42 and 44; Mixtral 57 and
95; Llama with adapters on all seven matrices 80 and 123, under autocast 94 and 130; eager attention 9 and 10 more.
"""

from __future__ import annotations

from brim.cost.flops import active_adapters, attentions, text_groups
from brim.cost.parameters import layer_linears
from brim.cost.setting import Setting, norm_is_fused
from brim.cost.states import quantised_linears
from brim.cost.traffic import Bytes as Count
from brim.spec.model import LayerGroup, ModelShape, Moe
from brim.spec.recipe import Recipe
from brim.spec.strategy import Strategy

SECONDS_PER_LAUNCH = 8e-6
"""Host time to dispatch one kernel from Python, autograd included, seconds.

Source: 5 to 25 microseconds of host work per operation (jiahuanglin.xyz, "From PyTorch op to kernel launch"); measured
for these very layers on a slow shared processor: 22 to 34 forward, 18 to 26 backward, so about 8 on a server's.
"""
OUTSIDE_LAYERS = Count(33, 23)
"""Embedding, masks, rotary tables, head and loss, counted like the layers."""
_NORM_WRITTEN_OUT, _ROTARY_WRITTEN_OUT = Count(8, 16), Count(10, 18)
_ONE = Count(1, 1)


def count_launches(shape: ModelShape, recipe: Recipe, strategy: Strategy, setting: Setting) -> Count:
    """Return the kernels of one micro-batch, forward and backward without recomputation."""
    total = OUTSIDE_LAYERS
    for group in text_groups(shape):
        total += _layer_launches(group, recipe, strategy, setting).times(group.count)
    return total


def _layer_launches(group: LayerGroup, recipe: Recipe, strategy: Strategy, setting: Setting) -> Count:
    norm = _ONE if norm_is_fused(group.norm, setting) else _NORM_WRITTEN_OUT
    total = norm.times(group.num_norms) + _products(group, recipe, setting) + Count(4, 8)
    for attention in attentions(group):
        total += Count(10, 11) if strategy.attention_kernel == "eager" else _ONE
        if attention.rotary:
            total += _ONE if setting.fused_rotary else _ROTARY_WRITTEN_OUT
        if attention.qk_norm != "none":
            total += norm.times(2)
    if isinstance(group.mlp, Moe):
        total += Count(20, 26)  # route, sort, gather, weigh, add back
    return total


def _products(group: LayerGroup, recipe: Recipe, setting: Setting) -> Count:
    """Matrix products with their gradients, adapters, and the expansion of quantised weights."""
    fused = recipe.engine.fused_experts
    backward = 2 if setting.trains_base else 1
    total = Count(1, backward).times(sum(1 if fused else copies for _, copies in layer_linears(group)))
    adapted = len(active_adapters(group, recipe))
    if adapted and setting.fused_adapters:
        total += Count(2, 5).times(adapted)
    else:
        total += (Count(8, 9) if setting.autocast else Count(6, 8)).times(adapted)
    if recipe.quantization is not None:
        scales = 2 if recipe.quantization.double_quant else 1
        total += Count(scales, scales).times(sum(copies for _, copies in quantised_linears(group, fused)))
    return total

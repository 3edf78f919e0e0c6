"""Seconds of one micro-batch, as coefficients of its size: products, attention, traffic, unpacked weights, launches."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from brim.cost.flops import (
    active_share,
    attentions,
    count_flops,
    count_outer_weights,
    count_pairs,
    repeats_attention,
    sequence_tokens,
    text_groups,
)
from brim.cost.launches import SECONDS_PER_LAUNCH, count_launches
from brim.cost.parameters import layer_linears
from brim.cost.rates import Rates, attention_fraction
from brim.cost.setting import Setting
from brim.cost.states import count_states, quantised_linears
from brim.cost.traffic import count_head_bytes, count_layer_bytes, count_score_bytes, read_fusion
from brim.spec.model import Attention
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

_TILE = 128
"""Rows and columns of the output tile one multiprocessor computes. Source: NVIDIA, Matrix Multiplication Background
User's Guide (DU-09799-001), section 2.3: 256x128 is the most efficient; smaller products take 128x128 and less."""
_MULTIPROCESSORS = 108
"""Of an A100; 40 on a T4, 148 on a B200. Only sizes the partly filled last wave."""
_FLASH_BACKWARD = 1.25
"""Flash attention computes scores again in its backward pass: five products for the four that are counted."""
_EXPANDED_BYTES = 2
"""An expanded weight is written once in 16 bit; the product that reads it is counted with the products."""
_PACKED_BYTES = {"nf4": 0.5, "fp4": 0.5, "gptq-int4": 0.5, "int8": 1.0, "fp8": 1.0}


class Passes(NamedTuple):
    """Coefficients of one micro-batch."""

    pass_seconds: tuple[tuple[float, float], ...]
    """For forward and backward: seconds per sequence, and the least it takes to read the weights."""
    sequence_seconds: float
    """Attention and traffic between products, per sequence."""
    overhead_seconds: float
    """What a micro-batch of any size pays on the device."""
    launch_seconds: float
    """What a micro-batch of any size costs the host."""
    sum_seconds: float
    """The part of the overhead that adds gradients to those of earlier micro-batches; the first has none."""


def count_passes(workload: Workload, strategy: Strategy, rates: Rates) -> Passes:
    """Return the coefficients of a micro-batch under a strategy's kernels, seconds.

    Leaves out: overlap of small kernels, and kernels shorter than their own start (the host bounds those).
    """
    one, setting = replace(strategy, micro_batch_size=1), read_fusion(workload, strategy)
    again = 0 if strategy.activation_checkpointing == "none" else 1
    flops, read = count_flops(workload, one), _weights_read(workload, setting) / rates.bytes_per_second
    products = (
        ((flops.matmul_forward + flops.matmul_recompute) / rates.matmul_flops_per_second, (1 + again) * read),
        (flops.matmul_backward / rates.matmul_flops_per_second, (2 if setting.trains_base else 1) * read),
    )
    launches = count_launches(workload.model, workload.recipe, strategy, setting)
    moved, sums = _traffic_bytes(workload, strategy, setting, again), _gradient_sum_bytes(workload)
    converted = _converted_bytes(workload, setting, again)
    return Passes(
        pass_seconds=products,
        sequence_seconds=_attention_seconds(workload, strategy, rates, setting) + moved / rates.bytes_per_second,
        overhead_seconds=(converted + sums) / rates.bytes_per_second
        + _padding_flops(workload, again) / rates.matmul_flops_per_second,
        launch_seconds=((1 + again) * launches.forward + launches.backward) * SECONDS_PER_LAUNCH,
        sum_seconds=sums / rates.bytes_per_second,
    )


def _weights_read(workload: Workload, setting: Setting) -> float:
    """Return the bytes of weights one pass reads, every expert included (each is visited by some token)."""
    layers = sum(
        group.count * copies * linear.num_weights
        for group in text_groups(workload.model)
        for linear, copies in layer_linears(group)
    )
    return float(setting.compute_bytes * (layers + count_outer_weights(workload.model)))


def _traffic_bytes(workload: Workload, strategy: Strategy, setting: Setting, again: int) -> float:
    """Return the bytes one sequence moves between products; checkpointing repeats the layers' forward."""
    shape, recipe = workload.model, workload.recipe
    head = count_head_bytes(shape, recipe, setting, strategy.loss_kernel)
    per_token = head.forward + head.backward
    for group in text_groups(shape):
        layer = count_layer_bytes(group, recipe, setting)
        per_token += group.count * ((1 + again) * layer.forward + layer.backward)
    return per_token * sequence_tokens(workload)


def _gradient_sum_bytes(workload: Workload) -> float:
    """Return the bytes of adding a micro-batch's gradients to those before it: read both, write the sum."""
    return 3.0 * count_states(workload.model, workload.recipe).gradients_bytes


def _converted_bytes(workload: Workload, setting: Setting, again: int) -> float:
    """Return the bytes of weights that are expanded or cast for each pass of a micro-batch, however small it is.

    Quantised matrices are expanded to 16 bit forward, backward and when recomputed; fp32 ones are cast under autocast
    (once per forward), and the gradients of those that train are cast back.

    Source: bitsandbytes autograd/_functions.py MatMul4Bit; torch autocast's weight cache.
    """
    recipe, groups = workload.recipe, text_groups(workload.model)
    outer, casting = count_outer_weights(workload.model), 4 + setting.compute_bytes
    if recipe.quantization is None:
        if not setting.autocast or recipe.weight_dtype != "fp32":
            return 0.0
        wide = outer + sum(g.count * copies * linear.num_weights for g in groups for linear, copies in layer_linears(g))
        return float(casting * ((1 + again) + (1 if setting.trains_base else 0)) * wide)
    packed = sum(
        group.count * copies * linear.num_weights
        for group in groups
        for linear, copies in quantised_linears(group, recipe.engine.fused_experts)
    )
    wide = recipe.quantization.upcast_rest and not recipe.quantization.narrow_embeddings
    upcast = 2 * casting * outer if wide and setting.autocast else 0
    return packed * (_PACKED_BYTES[recipe.quantization.kind] + _EXPANDED_BYTES) * (2 + again) + upcast


def _padding_flops(workload: Workload, again: int) -> float:
    """Return the operations of a micro-batch that compute nothing: unfilled waves of tiles, unfilled tiles of experts.

    A product runs in waves of one tile per multiprocessor, and on average half of the last wave is empty: that
    costs the same whatever the number of tokens. Tokens of an expert fill its last tile of rows by half.

    Source: NVIDIA, Matrix Multiplication Background User's Guide (DU-09799-001) sections 3.1 and 3.2.
    Leaves out: weight gradients, which cuBLAS splits along the tokens to fill the card.
    """
    total = 0.0
    for group in text_groups(workload.model):
        for linear, copies in layer_linears(group):
            routed = active_share(group, linear) < 1
            products = copies if routed and not workload.recipe.engine.fused_experts else 1
            wave = _TILE * _TILE * _MULTIPROCESSORS * products
            total += group.count * wave * ((1 + again) * linear.in_features + linear.out_features)
            total += group.count * (2 + again) * _TILE * linear.num_weights * copies if routed else 0.0
    return total


def _attention_seconds(workload: Workload, strategy: Strategy, rates: Rates, setting: Setting) -> float:
    """Return the seconds of attention of one sequence, forward, backward and recomputed, all layers."""
    again = 1 if repeats_attention(strategy) else 0
    by_kernel = _eager_seconds if strategy.attention_kernel == "eager" else _flash_seconds
    return sum(
        group.count * by_kernel(attention, workload, strategy, rates, setting, again)
        for group in text_groups(workload.model)
        for attention in attentions(group)
    )


def _flash_seconds(
    attention: Attention, workload: Workload, strategy: Strategy, rates: Rates, setting: Setting, again: int
) -> float:
    """Tiles on the diagonal are computed whole; SDPA gets a sliding window as a mask and skips nothing.

    Source: transformers integrations/sdpa_attention.py (a mask rules out the flash kernel and `is_causal`).
    """
    seq_len = sequence_tokens(workload)
    pairs = count_pairs(attention, seq_len)
    if pairs < seq_len * seq_len:
        windowed = attention.sliding_window is not None and attention.sliding_window < seq_len
        masked = windowed and strategy.attention_kernel == "sdpa"
        pairs = seq_len * seq_len if masked else min(seq_len * seq_len, pairs + seq_len * _TILE // 2)
    width = attention.head_dim + attention.v_head_dim
    flops = 2 * pairs * attention.num_attention_heads * width * (1 + again + 2 * _FLASH_BACKWARD)
    device = workload.cluster.device
    fraction = attention_fraction(device, rates.peak_flops_per_second, width // 2)
    return flops / (rates.peak_flops_per_second * fraction)


def _eager_seconds(
    attention: Attention, workload: Workload, strategy: Strategy, rates: Rates, setting: Setting, again: int
) -> float:
    """Scores in memory: every pair is computed, masked or not, and each kernel between moves all of them."""
    pairs = sequence_tokens(workload) ** 2
    moved = count_score_bytes(attention, setting.compute_bytes)
    width = attention.num_attention_heads * (attention.head_dim + attention.v_head_dim)
    products = 2 * pairs * width * (3 + again) / rates.matmul_flops_per_second
    return products + pairs * ((1 + again) * moved.forward + moved.backward) / rates.bytes_per_second

"""How fast a device really is: rates of products, attention and memory, from its data sheet and the share reached.

No constant here is fitted to training runs: each is a property of a kernel measured on its own, with its source.
"""

from __future__ import annotations

from dataclasses import dataclass

from brim.spec.device import Device
from brim.spec.recipe import Recipe

MATMUL_FRACTION = 0.75
"""Share of the dense rate that large products reach where the table has no measurement.

Source: median of the measured shares of data-centre and workstation cards in tables/gpus.toml is 0.77.
"""
HALVED_MATMUL_FRACTION = 0.95
"""The same for cards whose tensor cores are held to twice the fp32 rate (GeForce): the median there is 1.0."""
SHAPE_FRACTION = 0.85
"""Share of the best product's rate that a transformer's products reach: the table has the fastest of many shapes.

Source: stas00/ml-engineering compute/accelerator/benchmarks/README.md: a scan over 4096-wide matrices "should give
around 80-90 %" of the maximum, which is the fastest run of the best shape.
"""
BANDWIDTH_FRACTION = 0.85
"""Share of the memory bandwidth that kernels which stream whole tensors reach.

Source: te42kyfo/gpu-benches gpu-stream, `scale` and `triad` at full occupancy: V100 0.88 and 0.92, A100 0.88,
L40 0.89, MI210 0.83; H200 0.66 and 0.74.
"""
_BACKWARD_PENALTY = 0.9
"""FlashAttention-2 reaches 63 % backward where it reaches 73 % forward (arXiv 2307.08691 section 1): over both, 0.9."""
_OLD_INSTRUCTIONS = {9: 2 / 3, 10: 1 / 3}
"""Share of the products' rate open to kernels written for Ampere. Hopper: FlashAttention-3 (arXiv 2407.08608)
section 2.2 and its announcement: two thirds with mma.sync. Blackwell for data centres has twice the units: a third."""
_WITHOUT_FLASH = 0.5
"""Volta and Turing run the memory-efficient kernel, which computes in smaller tiles; about half, not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a device reaches in training kernels."""

    matmul_flops_per_second: float
    """Large products in the recipe's compute dtype, FLOP per second."""
    peak_flops_per_second: float
    """Data sheet rate of those products, FLOP per second."""
    bytes_per_second: float
    """Kernels that stream whole tensors, bytes per second."""


def read_rates(device: Device, recipe: Recipe) -> Rates | None:
    """Return what the device reaches under a recipe, None where the table lacks a rate that is needed.

    Leaves out: power and heat limits under a long load (the measured shares are of seconds-long runs), tf32
    (transformers leaves it off), fp8 and int8 products (costed as 16-bit ones).
    """
    peak = matmul_peak(device, recipe)
    if peak is None or device.memory_bytes_per_second is None:
        return None
    return Rates(
        matmul_flops_per_second=peak * matmul_fraction(device, peak) * SHAPE_FRACTION,
        peak_flops_per_second=peak,
        bytes_per_second=device.memory_bytes_per_second * BANDWIDTH_FRACTION,
    )


def matmul_peak(device: Device, recipe: Recipe) -> float | None:
    """Return the dense rate of products in the compute dtype, FLOP per second; None if unknown.

    bf16 on a card without bf16 units counts as fp32: torch converts, multiplies and converts back.

    Source: torch.cuda.is_bf16_supported (emulated before compute capability 8.0).
    """
    dtype = recipe.compute_dtype if recipe.autocast else recipe.weight_dtype
    if dtype == "fp16":
        return device.fp16_flops_per_second or device.fp32_flops_per_second
    if dtype == "bf16" and device.bf16_flops_per_second is not None:
        return device.bf16_flops_per_second
    return device.fp32_flops_per_second


def matmul_fraction(device: Device, peak: float) -> float:
    """Return the share of a dense rate that large products reach: measured, else by kind of card."""
    if device.matmul_fraction is not None:
        return device.matmul_fraction
    halved = device.fp32_flops_per_second is not None and peak <= 2.1 * device.fp32_flops_per_second
    return HALVED_MATMUL_FRACTION if halved else MATMUL_FRACTION


def attention_fraction(device: Device, peak: float, head_dim: int) -> float:
    """Return the share of the dense rate that flash attention reaches, forward and backward together.

    A score takes 4 x head_dim operations on tensor cores, one exponential (16 a clock and multiprocessor) and
    about five fp32 instructions (scale, maximum, subtract, sum, convert); the two do not overlap in these kernels.
    So the share falls where tensor cores are far faster than fp32: 0.53 on A100, 0.34 on H100, 0.8 on RTX 4090.

    Source: FlashAttention-3 (arXiv 2407.08608) section 3.1 for the count; published: 0.50 to 0.73 on A100, 0.34 on
    H100 (FlashAttention-2, arXiv 2307.08691, abstract and section 4.1).
    Leaves out: kernels that overlap both (FlashAttention-3, cuDNN), up to twice as fast on Hopper and later.
    """
    major = device.compute_capability[0] if device.compute_capability else 8
    lanes = 64 if device.compute_capability in ((7, 0), (7, 5), (8, 0)) else 128
    slots = lanes / 16 + 5
    ratio = peak / device.fp32_flops_per_second if device.fp32_flops_per_second else 8.0
    products = 1 / (matmul_fraction(device, peak) * _OLD_INSTRUCTIONS.get(major, 1.0))
    share = _BACKWARD_PENALTY / (products + 2 * slots * ratio / (4 * head_dim))
    return share * (_WITHOUT_FLASH if major < 8 else 1.0)

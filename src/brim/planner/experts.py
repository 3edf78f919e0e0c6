"""Experts that quantisation does not reach."""

from __future__ import annotations

from brim.spec.model import Moe
from brim.spec.workload import Workload

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def unquantised_expert_bytes(workload: Workload) -> int:
    """Return the bytes of experts that stay unquantised under a quantised base; 0 where none do.

    transformers 5 keeps all experts of a layer in one parameter, bitsandbytes replaces modules only; PEFT's upcast
    for k-bit training (`upcast_rest`) turns 16-bit parameters into fp32.
    """
    recipe = workload.recipe
    if recipe.quantization is None or not recipe.engine.fused_experts:
        return 0
    element = 4 if recipe.quantization.upcast_rest else _ELEMENT_BYTES[recipe.weight_dtype]
    return element * sum(
        group.count * group.mlp.num_experts * linear.num_parameters
        for group in workload.model.groups
        if isinstance(group.mlp, Moe)
        for linear in group.mlp.expert_linears
    )

"""Which kernel of PyTorch's attention a card runs: one choice for the formula and the trace.

Leaves out: cuDNN's kernel, which holds what flash holds but the fp32 gradient of the queries; and PyTorch after 2.13,
whose fused kernels take one key head, and grouped ones under a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brim.spec.recipe import Dtype

Kernel = Literal["flash", "efficient", "math"]

AMPERE = (8, 0)
FUSED_OPERATORS = (
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip
"""Operators of `aten` that the kernels are; what they return, selective checkpointing keeps."""
_WIDEST_FLASH_HEAD = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """A call of `scaled_dot_product_attention` on a card."""

    dtype: Dtype
    """Dtype of queries, keys and values."""
    query_heads: int
    """Heads of the queries."""
    key_heads: int
    """Heads of keys and values."""
    key_width: int
    """Elements of a head of queries and keys."""
    value_width: int
    """Elements of a head of the values."""
    grouped: bool
    """Whether it is told that several query heads share a key head (`enable_gqa`)."""
    masked: bool
    """Whether it is given a mask."""
    oblong: bool = False
    """Whether it is causal over more or fewer keys than queries."""
    drops: bool = False
    """Whether scores are dropped out."""
    needs_grad: bool = True
    """Whether a backward pass follows."""
    capability: tuple[int, int]
    """CUDA compute capability of the card."""


def choose_kernel(call: AttentionCall) -> Kernel:
    """Return the kernel that PyTorch picks: flash, then memory-efficient, then plain products.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp can_use_flash_attention,
    can_use_mem_efficient_attention; sdp_utils_cpp.h check_batch_size_and_num_heads_dense: fewer key heads are taken
    only by flash, and only if it is told.
    """
    heads_differ = call.query_heads != call.key_heads
    if not (call.masked or call.oblong or (heads_differ and not call.grouped)) and explain_no_flash(call) is None:
        return "flash"
    recent = call.capability >= AMPERE
    alignment = 4 if call.dtype == "fp32" or not recent else 8
    aligned = call.key_width % alignment == 0 and call.value_width % alignment == 0
    return "efficient" if aligned and (recent or call.dtype != "bf16") and not heads_differ else "math"


def explain_no_flash(call: AttentionCall) -> str | None:
    """Return why a card cannot run flash attention on such tensors; None if it can.

    Source: sdp_utils.cpp check_flash_attention_hardware_support, check_dtypes_low_precision, check_head_dim_size_flash,
    check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120.
    """
    major, minor = call.capability
    width = call.key_width
    if call.capability < AMPERE:
        return f"compute capability {major}.{minor} is below 8.0"
    if call.dtype == "fp32":
        return "attention runs in fp32, and the kernel takes fp16 or bf16"
    if width > _WIDEST_FLASH_HEAD or width != call.value_width:
        return f"heads are {width} and {call.value_width} wide, and the kernel takes equal widths up to 256"
    consumer = (8, 6) <= call.capability <= (8, 9) or major == 12
    if consumer and call.needs_grad and (192 < width <= 224 or (width > 224 and call.drops)):
        return f"heads {width} wide have no backward pass on compute capability {major}.{minor}"
    return None

"""The kernels of the target card, on tensors of the CPU: attention, dropout, autocast, and what they hold inside.

On a CPU, attention falls to the kernel that holds every score. While `card_kernels` lasts, the kernel that the card
would pick is called instead; on fake tensors no card is needed. A function is replaced rather than intercepted by a
mode, so that recomputation inside the backward pass meets it too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from brim.cost.attention_kernels import AMPERE, AttentionCall, Kernel, choose_kernel, explain_no_flash
from brim.errors import ProbeFailed
from brim.probes.dtypes import dtype_name
from brim.probes.plain_attention import attend_plainly, make_additive, plain_buffers
from brim.spec.device import Device
from brim.spec.strategy import AttentionKernel

_MASK_ALIGNMENT, _FLASH_ALIGNMENT = 16, 8
_FLASH_BLOCK = 128
_UNSORTED_INDICES, _ROWS_PER_THREAD = 3072, 10
_NARROW = (torch.bfloat16, torch.float16)


def read_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *,
    dropout: float, causal: bool, grouped: bool, capability: tuple[int, int],
) -> AttentionCall:  # fmt: skip
    """Return what decides the kernel of a call.

    Raises:
        ProbeFailed: attention runs in a dtype that no model trains in.
    """
    dtype = dtype_name(query.dtype)
    if dtype is None:
        raise ProbeFailed(f"attention runs in {str(query.dtype)[6:]}, which is none of fp32, bf16 and fp16")
    return AttentionCall(
        dtype=dtype, query_heads=query.shape[1], key_heads=key.shape[1], key_width=query.shape[-1],
        value_width=value.shape[-1], grouped=grouped, masked=mask is not None,
        oblong=causal and query.shape[-2] != key.shape[-2], drops=dropout > 0,
        needs_grad=needs_grad(query, key, value), capability=capability,
    )  # fmt: skip


def needs_grad(*tensors: torch.Tensor) -> bool:
    """Whether autograd will want something of an operation on these tensors."""
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)


def _attend(wanted: AttentionKernel, capability: tuple[int, int]) -> Callable[..., torch.Tensor]:
    """Return a stand-in for scaled_dot_product_attention on a card."""

    def attend(  # type: ignore[no-untyped-def]
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):  # the function stands in CUDA's list, not in the CPU's
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
            attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = make_additive(attn_mask, query.dtype)
        call = read_call(
            query, key, value, attn_mask, dropout=dropout_p, causal=is_causal, grouped=enable_gqa, capability=capability
        )
        kernel = _find_kernel(wanted, call)
        width_scale = query.shape[-1] ** -0.5 if scale is None else scale
        if kernel == "flash":
            return _flash(query, key, value, dropout_p, is_causal, width_scale)
        if kernel == "efficient":
            return _efficient(query, key, value, attn_mask, dropout_p, is_causal, width_scale)
        with torch.autocast("cpu", enabled=False):  # off below the function that it cast the inputs of
            return attend_plainly(query, key, value, attn_mask, dropout_p, is_causal, width_scale, enable_gqa)

    return attend


def _find_kernel(wanted: AttentionKernel, call: AttentionCall) -> Kernel:
    if wanted != "flash":
        return choose_kernel(call)
    problem = explain_no_flash(call)
    if problem:
        raise ProbeFailed(f"the card cannot run flash attention here: {problem}; use attention kernel sdpa")
    return "flash"


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, causal: bool, scale: float
) -> torch.Tensor:
    width = query.shape[-1]
    short = -width % _FLASH_ALIGNMENT
    if short:
        query, key, value = (torch.nn.functional.pad(tensor, (0, short)) for tensor in (query, key, value))
    operator = torch.ops.aten._scaled_dot_product_flash_attention.default
    return operator(query, key, value, dropout, causal, False, scale=scale)[0][..., :width]


def _efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float,
    causal: bool, scale: float,
) -> torch.Tensor:  # fmt: skip
    if mask is not None:
        length = mask.shape[-1]
        if length % _MASK_ALIGNMENT:
            mask = torch.nn.functional.pad(mask, (0, -length % _MASK_ALIGNMENT))[..., :length]
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], length)
    keeps = needs_grad(query, key, value)
    operator = torch.ops.aten._scaled_dot_product_efficient_attention.default
    return operator(query, key, value, mask, keeps, dropout, causal, scale=scale)[0]


def _drop_out(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """One kernel that keeps a boolean mask; the CPU's keeps a mask in the input's dtype.

    Source: aten/src/ATen/native/Dropout.cpp is_fused_kernel_acceptable.
    """
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


@contextlib.contextmanager
def card_kernels(device: Device, attention: AttentionKernel) -> Iterator[None]:
    """Replace attention and dropout by those of a card while the context lasts."""
    functions: Any = torch.nn.functional
    originals = functions.scaled_dot_product_attention, functions.dropout
    functions.scaled_dot_product_attention = _attend(attention, device.compute_capability or AMPERE)
    functions.dropout = _drop_out
    try:
        yield
    finally:
        functions.scaled_dot_product_attention, functions.dropout = originals


_WIDENED = frozenset(
    function
    for name in ("pow", "rsqrt", "softmax", "log_softmax", "sum", "cumsum", "exp", "expm1", "log", "softplus", "prod",
                 "reciprocal", "layer_norm", "logsumexp", "__pow__", "norm")
    for place in (torch, torch.Tensor, torch.nn.functional)
    if (function := getattr(place, name, None)) is not None
)  # fmt: skip


class CudaAutocast(TorchFunctionMode):
    """Operators that CUDA's autocast runs in fp32 and the CPU's does not.

    Source: aten/src/ATen/autocast_mode.h AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.autograd.backward:
            return self._stay_on(*args, **(kwargs or {}))
        if func in _WIDENED and torch.is_autocast_enabled("cpu"):
            args = tuple(_widen(one) for one in args)
            kwargs = {key: _widen(one) for key, one in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _stay_on(self, tensors: Any, **kwargs: Any) -> None:
        """Run a backward pass, and the forward passes it repeats, under the mode.

        From torch 2.13 on a mode may take the place of `backward`, and a mode is off while it does. Edges of the graph
        have no type to ask for a substitute. Source: torch/autograd/__init__.py backward.
        """
        edges = [get_gradient_edge(one) if isinstance(one, torch.Tensor) else one for one in tensors]
        with self:
            torch.autograd.backward(edges, **kwargs)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _NARROW else value


def list_workspaces(func: Any, args: tuple[Any, ...], result: Any) -> list[int]:
    """Return the bytes of each buffer that an operator's CUDA kernel holds inside, all at once, in the order made.

    Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp mha_bwd (fp32 query gradient, row sums,
    gradients of every head under grouped queries); mem_eff_attention/kernel_backward.h (fp32 query gradient);
    native/cuda/EmbeddingBackwardKernel.cu (sorted indices, fp32 partial sums); plain_attention.plain_buffers.
    """
    aten = torch.ops.aten
    if func is aten._scaled_dot_product_flash_attention_backward.default:
        return _flash_backward_buffers(args[1], args[2])
    if func is aten._scaled_dot_product_efficient_attention_backward.default:
        return _efficient_backward_buffers(args[1])
    if func is aten.embedding_dense_backward.default:
        return _embedding_buffers(args[0], args[1], args[2])
    if func is aten._safe_softmax.default:
        return plain_buffers(args[0])
    return []


def _flash_backward_buffers(query: torch.Tensor, key: torch.Tensor) -> list[int]:
    """Row sums, fp32 query gradient, keys' and values' gradients of every head: a block each, held together."""
    batch, heads, length, width = query.shape
    rows = batch * heads * (-(-length // _FLASH_BLOCK) * _FLASH_BLOCK)
    step = 32 if width <= 128 else 64
    buffers = [rows * 4, rows * (-(-width // step) * step) * 4]
    if key.shape[1] != heads:
        buffers += [batch * key.shape[2] * heads * width * key.element_size()] * 2
    return buffers


def _efficient_backward_buffers(query: torch.Tensor) -> list[int]:
    row_sums = query.numel() // query.shape[-1] * 4
    return [row_sums + (query.numel() * 4 if query.dtype in _NARROW else 0)]


def _embedding_buffers(gradient: torch.Tensor, indices: torch.Tensor, num_weights: int) -> list[int]:
    count = indices.numel()
    if count <= _UNSORTED_INDICES:
        return []
    segments = count // _ROWS_PER_THREAD + min(count, num_weights)
    return [4 * count * 8 + segments * gradient.shape[-1] * 4]

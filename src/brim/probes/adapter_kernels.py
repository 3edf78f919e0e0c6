"""LoRA and its frozen matrices as one autograd function each for queries, keys and values, for a matrix, for an MLP.

Nothing is kept but the input (of an MLP, its two projections too): frozen matrices are unpacked again in the backward
pass, and gradients are written over what was kept. Both packages are one design; what differs is in `Style`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

_SCALE_BLOCK = 64
"""Source: bitsandbytes functional.py quantize_4bit, one fp32 scale per block when unpacked."""


class Style(NamedTuple):
    """How a package writes the same functions."""

    keeps_dropped: bool
    """Whether dropped-out inputs are kept rather than masks, and mask gradients by `!= 0`."""
    adds_in_place: bool
    """Whether products are added by the product itself rather than made and added."""


UNSLOTH = Style(keeps_dropped=False, adds_in_place=True)
"""Source: unsloth 2026.10 kernels/fast_lora.py LoRA_QKV, LoRA_W, LoRA_MLP; kernels/utils.py matmul_lora."""
FOAK = Style(keeps_dropped=True, adds_in_place=False)
"""Source: fms-acceleration fms_acceleration_foak fused_ops/unsloth_lora/bnb/fast_lora.py and utils.py matmul_lora."""


class Scratch:
    """One buffer that all matrices are unpacked into in turn, kept from then on.

    Source: unsloth kernels/utils.py _scratch, fast_dequantize(use_global_buffer=True).
    """

    def __init__(self) -> None:
        self.buffers: tuple[torch.Tensor, ...] = ()

    def unpack(self, base: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix (out, in) of a quantised linear."""
        shape = (base.out_features, base.in_features)
        count = shape[0] * shape[1]  # type: ignore[operator]
        if not self.buffers or self.buffers[0].numel() < count:
            self.buffers = ()
            self.buffers = torch.empty(count, dtype=dtype), torch.empty(count // _SCALE_BLOCK)
        return self.buffers[0][:count].view(shape)


class Projection(NamedTuple):
    """A frozen matrix with its adapter's constants."""

    base: torch.nn.Module
    scale: float
    dropout: float
    """Fraction dropped before the adapter in this pass."""
    scratch: Scratch | None
    """Where the forward pass unpacks the matrix; None: into a tensor of its own."""


def unpack(base: torch.nn.Module) -> torch.Tensor:
    """Return the matrix (out, in) of a linear, unpacked into a new tensor where it is quantised.

    GPTQ unpacks to (in, out). Leaves out: its fused form unpacks the matrices of queries, keys and values together.
    """
    if not hasattr(base, "dequantize"):
        return base.weight  # type: ignore[return-value]
    matrix: torch.Tensor = base.dequantize()  # type: ignore[operator]
    return matrix if matrix.shape[0] == base.out_features else matrix.t()


def _multiply(
    x: torch.Tensor, part: Projection, down: torch.Tensor, up: torch.Tensor, style: Style
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the product of rows with matrix and adapter, and what their dropout leaves to keep."""
    scratch = part.scratch if hasattr(part.base, "dequantize") else None
    out = x @ (unpack(part.base) if scratch is None else scratch.unpack(part.base, x.dtype)).t()
    dropped, kept = (x, None) if not part.dropout else torch.native_dropout(x, part.dropout, True)
    if style.keeps_dropped:
        kept = dropped if part.dropout else None
    _add_product(out, dropped @ down.to(x.dtype).t(), up.to(x.dtype).t(), part.scale, style)
    if getattr(part.base, "bias", None) is not None:
        out += part.base.bias
    return out, kept


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, style: Style) -> None:
    if style.adds_in_place:
        total.addmm_(left, right, alpha=scale)
    else:
        total += left @ (scale * right)


def _dropped_input(x: torch.Tensor, kept: torch.Tensor | None, part: Projection, style: Style) -> torch.Tensor:
    """What the adapter saw."""
    if kept is None or style.keeps_dropped:
        return x if kept is None else kept
    return torch.ops.aten.native_dropout_backward(x, kept, 1.0 / (1.0 - part.dropout))


def _found(
    x: torch.Tensor, gradient: torch.Tensor, part: Projection, kept: torch.Tensor | None,
    factors: tuple[torch.Tensor, torch.Tensor], style: Style,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of a projection's factors, from its input and what was kept of that."""
    return _factor_gradients(_dropped_input(x, kept, part, style), gradient, *factors, part.scale)


def _factor_gradients(
    seen: torch.Tensor, gradient: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gradients of both factors, and that of the product between them, unscaled."""
    between = gradient @ up
    down_gradient = (between.t() @ seen).mul_(scale)
    up_gradient = (gradient.t() @ (seen @ down.t())).mul_(scale)
    return down_gradient, up_gradient, between


def _add_input_gradient(
    total: torch.Tensor | None, gradient: torch.Tensor, between: torch.Tensor, part: Projection, down: torch.Tensor,
    kept: torch.Tensor | None, x: torch.Tensor, style: Style, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the sum of input gradients with this projection's; the first is written to `out` if that is given."""
    matrix = unpack(part.base)
    if total is None:
        total = torch.matmul(gradient, matrix, out=out) if out is not None else gradient @ matrix
    elif style.adds_in_place:
        total.addmm_(gradient, matrix)
    else:
        total += gradient @ matrix
    del matrix
    if style.keeps_dropped:
        total += ((x if kept is None else kept) != 0) * (between @ (part.scale * down))
    elif kept is None:
        total.addmm_(between, down, alpha=part.scale)
    else:
        scale = part.scale / (1.0 - part.dropout)
        total.add_(torch.ops.aten.native_dropout_backward(between @ down, kept, scale))
    return total


def _pair(factors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(factors[0::2], factors[1::2], strict=True))


class FusedLora(torch.autograd.Function):
    """Projections of one input, each with an adapter.

    Source: `UNSLOTH` and `FOAK`, LoRA_QKV and LoRA_W.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[misc]
    def forward(
        ctx: Any, x: torch.Tensor, parts: Sequence[Projection], style: Style, over_input: bool, *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return one output per projection.

        Args:
            over_input: whether the gradient of the input is written over the input.
        """
        rows = x.reshape(-1, x.shape[-1])
        made, kept = [], []
        for part, (down, up) in zip(parts, _pair(factors), strict=True):
            out, left = _multiply(rows, part, down, up, style)
            made.append(out.view(*x.shape[:-1], -1))
            kept.append(left)
        ctx.save_for_backward(x, *kept, *factors)
        ctx.parts, ctx.style, ctx.over_input = parts, style, over_input
        return tuple(made)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[misc]
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the input and of every factor."""
        x, *rest = ctx.saved_tensors
        count, rows = len(ctx.parts), x.reshape(-1, x.shape[-1])
        kept, pairs = rest[:count], _pair([one.to(x.dtype) for one in rest[count:]])
        flat = [one.reshape(-1, one.shape[-1]) for one in gradients]
        found, between = [], []
        for part, left, (down, up), gradient in zip(ctx.parts, kept, pairs, flat, strict=True):
            *both, middle = _found(rows, gradient, part, left, (down, up), ctx.style)
            found += both
            between.append(middle)
        total = None
        for part, left, (down, _), gradient, middle in zip(ctx.parts, kept, pairs, flat, between, strict=True):
            out = rows if ctx.over_input else None
            total = _add_input_gradient(total, gradient, middle, part, down, left, rows, ctx.style, out)
        assert total is not None
        return total.view(x.shape), None, None, None, *found


class FusedLoraMlp(torch.autograd.Function):
    """A gated MLP with an adapter on each of its matrices: gate, up, down.

    Source: `UNSLOTH` and `FOAK`, LoRA_MLP; swiglu.py swiglu_DWf_DW_dfg_kernel writes over its three inputs.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[misc]
    def forward(
        ctx: Any, x: torch.Tensor, parts: Sequence[Projection], style: Style, *factors: torch.Tensor
    ) -> torch.Tensor:
        """Return the output of the MLP."""
        rows, pairs = x.reshape(-1, x.shape[-1]), _pair(factors)
        gate, gate_kept = _multiply(rows, parts[0], *pairs[0], style)
        up, up_kept = _multiply(rows, parts[1], *pairs[1], style)
        inner = torch.empty_like(gate)
        out, down_kept = _multiply(inner, parts[2], *pairs[2], style)
        ctx.save_for_backward(x, gate, up, gate_kept, up_kept, down_kept, *factors)
        ctx.parts, ctx.style = parts, style
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[misc]
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the input and of every factor."""
        x, gate, up, *rest = ctx.saved_tensors
        kept, pairs = rest[:3], _pair([one.to(x.dtype) for one in rest[3:]])
        rows, gradient = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, gradients[0].shape[-1])
        (gate_part, up_part, down_part), style = ctx.parts, ctx.style
        inner = gradient @ unpack_forward(down_part, x.dtype)
        _add_product(inner, gradient @ pairs[2][1], pairs[2][0], down_part.scale, style)
        down_found = _found(inner, gradient, down_part, kept[2], pairs[2], style)[:2]
        # from here on the kernel has written the gradients of up and gate over what was kept
        *up_found, up_between = _found(rows, gate, up_part, kept[1], pairs[1], style)
        *gate_found, gate_between = _found(rows, up, gate_part, kept[0], pairs[0], style)
        total = _add_input_gradient(None, gate, up_between, up_part, pairs[1][0], kept[1], rows, style, rows)
        total = _add_input_gradient(total, up, gate_between, gate_part, pairs[0][0], kept[0], rows, style)
        return total.view(x.shape), None, None, *gate_found, *up_found, *down_found


def unpack_forward(part: Projection, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix (out, in) where the forward pass unpacks it."""
    if part.scratch is None or not hasattr(part.base, "dequantize"):
        return unpack(part.base)
    return part.scratch.unpack(part.base, dtype)

"""Fused layer kernels as autograd functions: RMS norm, rotary embedding, gated activation.

A Triton kernel writes into tensors its Python side has made, often over its own inputs. Only the tensors are repeated
here: shapes and dtypes are right, values arbitrary.
"""

from __future__ import annotations

from typing import Any

import torch

_MULTIPROCESSORS = 108
"""Of an A100; each writes one row of partial sums for a trained weight (132 on an H100: 0.4 MB more of a temporary)."""


class FusedRmsNorm(torch.autograd.Function):
    """Keeps its input and one fp32 scale a row.

    Source: Liger-Kernel ops/rms_norm.py LigerRMSNormFunction; unsloth kernels/rms_layernorm.py Fast_RMS_Layernorm;
    fms-acceleration fms_acceleration_foak kernels/unsloth/rms_layernorm.py.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, in_place: bool, trains_weight: bool
    ) -> torch.Tensor:  # fmt: skip
        """Return the normalised input in its dtype.

        Args:
            in_place: whether the gradient of the input is written over that of the output.
            trains_weight: whether a trained weight gets a gradient at all.
        """
        rows = x.contiguous().view(-1, x.shape[-1])
        scale = rows.new_empty(rows.shape[0], dtype=torch.float32)
        ctx.save_for_backward(rows, weight, scale)
        ctx.in_place, ctx.trains_weight = in_place, trains_weight
        return torch.empty_like(rows).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of input and weight."""
        weight, gradient = ctx.saved_tensors[1], gradients[0].contiguous()
        weight_gradient = None
        trains = ctx.needs_input_grad[1] and ctx.trains_weight
        sums = weight.new_empty((_MULTIPROCESSORS, weight.numel()), dtype=torch.float32) if trains else None
        made = gradient if ctx.in_place else torch.empty_like(gradient)
        if sums is not None:
            weight_gradient = sums.sum(dim=0).to(weight.dtype)
        return made, weight_gradient, None, None


class FusedRotary(torch.autograd.Function):
    """Rotates queries and keys where they are, heads copied out of a wider tensor first.

    Source: Liger-Kernel ops/rope.py LigerRopeFunction; fms-acceleration fms_acceleration_foak
    kernels/unsloth/rope_embedding.py; unsloth kernels/rope_embedding.py Fast_RoPE_Embedding_QK_Positions, whose
    backward pass makes new tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, in_place: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both, (batch, heads, length, width) laid out as (batch, length, heads, width).

        Args:
            in_place: whether the backward pass, too, writes over what it is given.
        """
        ctx.save_for_backward(cos, sin)
        ctx.in_place = in_place
        query, key = (one.transpose(1, 2).contiguous().transpose(1, 2) for one in (query, key))
        return query.view_as(query), key.view_as(key)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of queries and keys."""
        if ctx.in_place:
            query, key = (one.transpose(1, 2).contiguous().transpose(1, 2) for one in gradients)
        else:
            query, key = (torch.empty_like(one.transpose(1, 2)).transpose(1, 2) for one in gradients)
        return query, key, None, None, None


class FusedGate(torch.autograd.Function):
    """Activation and gate in one: keeps both projections and writes their gradients over them.

    Source: Liger-Kernel ops/swiglu.py LigerSiLUMulFunction, ops/geglu.py LigerGELUMulFunction.
    """

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return the activated gate times the other projection."""
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return both projections' own storages as their gradients."""
        gate, up = ctx.saved_tensors
        return gate, up

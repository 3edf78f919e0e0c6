"""Attention by plain products, as PyTorch writes it where no fused kernel takes a call: every score is a tensor.

Written out because PyTorch's own function does otherwise with tensors of a subclass, as fake ones are: it adds the mask
into a new tensor.
"""

from __future__ import annotations

import math

import torch

_NARROW = (torch.bfloat16, torch.float16)


def attend_plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float,
    causal: bool, scale: float, grouped: bool,
) -> torch.Tensor:  # fmt: skip
    """Return attention's result; narrow tensors are widened first, and variables live until the end as in C++.

    Source: aten/src/ATen/native/transformers/attention.cpp _scaled_dot_product_attention_math,
    pre_process_group_query_attention_input.
    """
    dtype, root = query.dtype, math.sqrt(scale)
    wide_query, wide_key, wide_value = (one.float() if dtype in _NARROW else one for one in (query, key, value))
    scaled = wide_query * root
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        mask = make_additive(mask, scaled.dtype)
    keys, values = wide_key, wide_value
    if grouped:
        keys, values = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (wide_key, wide_value))
    scores = torch.matmul(scaled, keys.transpose(-2, -1) * root)
    if mask is not None:
        scores.add_(mask)
    scores = torch.ops.aten._safe_softmax.default(scores, -1)
    if dropout > 0:
        scores = torch.native_dropout(scores, dropout, True)[0]
    answered = scores.to(dtype)  # for a second result, which nobody reads
    out = torch.matmul(scores, values).to(dtype)
    del answered
    return out


def make_additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Source: aten/src/ATen/native/transformers/attention.cpp convert_boolean_attn_mask, for each call anew."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask.logical_not(), -math.inf)


def plain_buffers(scores: torch.Tensor) -> list[int]:
    """Return the bytes of what the softmax makes beside its result: which scores are barred, and which rows wholly.

    Source: profile of aten::_safe_softmax, torch 2.13; empty rows are filled in place.
    """
    return [scores.numel(), scores.numel() // scores.shape[-1]]

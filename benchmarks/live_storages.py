"""Live tensor storages of a real training step on CPU: what autograd keeps, and the highest point.

Every storage an operator returns is followed through a weak reference. The attention kernel is replaced by one that
keeps what the kernels on CUDA keep.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from brim.probes.kernels import CudaAutocast

__all__ = ["CudaAutocast", "LiveStorages", "cuda_kernels"]


class LiveStorages(TorchDispatchMode):
    """Counts bytes of storages made inside the mode while they live."""

    def __init__(self, ignored: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.peak_at = ""
        self.makers: dict[int, tuple[str, str, int]] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in ignored}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor, str(func))
        return result

    def _follow(self, tensor: torch.Tensor, maker: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.makers[key] = (maker, f"{str(tensor.dtype)[6:]}{list(tensor.shape)}", size)
        self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_at = self.live_bytes, maker
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.makers.pop(key, None)
        self.live_bytes -= size

    def inventory(self) -> Counter[tuple[str, str, int]]:
        """Return the live storages by maker, dtype and shape, and bytes."""
        return Counter(self.makers.values())


class _Attention(torch.autograd.Function):
    """Scaled dot-product attention that keeps queries, keys, values, output, log-sum-exp and bias, as CUDA kernels do.

    Source: aten _scaled_dot_product_flash_attention and _scaled_dot_product_efficient_attention; the output is laid
    out (batch, length, heads, width).
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, scale, causal):  # type: ignore[no-untyped-def]
        groups = q.shape[1] // k.shape[1]
        wide_k, wide_v = k.float().repeat_interleave(groups, 1), v.float().repeat_interleave(groups, 1)
        scores = q.float() @ wide_k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
        if bias is not None:
            scores = scores + bias
        if causal:
            scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)
        lse = scores.logsumexp(-1)
        out = (scores.softmax(-1) @ wide_v).to(q.dtype)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, lse, bias)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, _, lse, bias = ctx.saved_tensors
        query_sum, rows = torch.empty(q.shape, dtype=torch.float32), torch.empty_like(lse)
        wide = [torch.empty_like(q), torch.empty_like(q)] if k.shape[1] != q.shape[1] else []
        gradients = [torch.zeros_like(tensor) for tensor in (q, k, v)]
        del query_sum, rows, wide
        return *gradients, torch.zeros_like(bias) if ctx.needs_input_grad[3] else None, None, None


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):  # type: ignore[no-untyped-def]
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # aten attention.cpp convert_boolean_attn_mask
        attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    if torch.is_autocast_enabled("cpu"):  # CUDA's autocast list holds this function, the CPU's does not
        query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
        attn_mask = attn_mask.to(torch.bfloat16) if attn_mask is not None else None
    if query.shape[1] != key.shape[1] and (attn_mask is not None or not enable_gqa):  # no fused kernel takes these
        plain = torch.ops.aten._scaled_dot_product_attention_math.default
        with torch.autocast("cpu", enabled=False):
            return plain(query, key, value, attn_mask, 0.0, is_causal, None, scale=scale, enable_gqa=enable_gqa)[0]
    return _Attention.apply(query, key, value, attn_mask, scale, is_causal)


def _drop_out(input, p=0.5, training=True, inplace=False):  # type: ignore[no-untyped-def]
    """CUDA's dropout is one kernel that keeps a boolean mask; the CPU's keeps a mask in the input's dtype."""
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


@contextlib.contextmanager
def cuda_kernels() -> Iterator[None]:
    """Replace attention and dropout while the context lasts."""
    functions = torch.nn.functional
    originals = functions.scaled_dot_product_attention, functions.dropout
    functions.scaled_dot_product_attention, functions.dropout = _attend, _drop_out  # type: ignore[assignment]
    try:
        yield
    finally:
        functions.scaled_dot_product_attention, functions.dropout = originals  # type: ignore[assignment]

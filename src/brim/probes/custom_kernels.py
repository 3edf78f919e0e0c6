"""Kernels of packages that need a card (mamba-ssm, causal-conv1d, flash-linear-attention), as what they allocate.

transformers calls these packages where they are installed, and otherwise code that loops over tokens or holds every
state, which nobody trains with. A stand-in makes the tensors the kernel makes and keeps those it keeps; it computes
nothing.

Leaves out: what Triton autotuning allocates; the order of the short-lived tensors inside a kernel is the source's up
to small ones.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch

_SCAN_CHUNK, _DELTA_CHUNK = 2048, 64
_PACKAGES = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "fla": "flash-linear-attention"}


class _CausalConv(torch.autograd.Function):
    """Source: causal-conv1d causal_conv1d_interface.py CausalConv1dFn, csrc/causal_conv1d.cpp."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = _inner_contiguous(x)
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        wide = torch.zeros_like(weight, dtype=torch.float32)
        return torch.empty_like(x), wide.to(weight.dtype), None if bias is None else torch.zeros_like(bias)


class _SelectiveScan(torch.autograd.Function):
    """Source: mamba_ssm ops/selective_scan_interface.py SelectiveScanFn; csrc/selective_scan/selective_scan.cpp."""

    @staticmethod
    def forward(ctx: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> torch.Tensor:
        u, delta, B, C = (_inner_contiguous(one) for one in (u, delta, B, C))
        z = None if z is None else _inner_contiguous(z)
        out, states, gated = _scan(u, delta, A, z)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, states, out if z is not None else None)
        return out if z is None else gated

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        u, delta, A, B, C, D, z, bias, _, _ = ctx.saved_tensors
        gradient = _inner_contiguous(gradient)
        return *_scan_back(u, delta, A, B, C, D), _like(z), None if bias is None else torch.zeros_like(bias)


class _MambaInner(torch.autograd.Function):
    """Source: mamba_ssm ops/selective_scan_interface.py MambaInnerFn, checkpoint_lvl 1."""

    @staticmethod
    def forward(
        ctx: Any, xz: Any, conv: Any, conv_bias: Any, x_proj: Any, dt_proj: Any, out_proj: Any, out_bias: Any,
        A: Any, D: Any, dt_bias: Any,
    ) -> torch.Tensor:  # fmt: skip
        dtype = _autocast_dtype(xz)
        x_proj, dt_proj, out_proj = (one.to(dtype) for one in (x_proj, dt_proj, out_proj))
        out_bias = None if out_bias is None else out_bias.to(dtype)
        xz = _inner_contiguous(xz)
        x, z = xz.chunk(2, dim=1)
        rank, states = dt_proj.shape[1], A.shape[1]
        convolved, x_dbl, delta = _project(x, x_proj, dt_proj)
        B, C = (
            x_dbl[:, at : at + states].reshape(x.shape[0], -1, 1, states).permute(0, 2, 3, 1).contiguous()
            for at in (rank, rank + states)
        )
        out, scanned, gated = _scan(convolved, delta, A, z)
        ctx.save_for_backward(
            xz, conv, conv_bias, x_dbl, x_proj, dt_proj, out_proj, A, B, C, D, dt_bias, scanned, out, out_bias
        )
        return torch.nn.functional.linear(gated.transpose(1, 2), out_proj, out_bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        xz, conv, conv_bias, x_dbl, x_proj, dt_proj, out_proj, A, B, C, D, dt_bias, _, out, out_bias = (
            ctx.saved_tensors
        )
        x = xz.chunk(2, dim=1)[0]
        gradient = _inner_contiguous(gradient)
        convolved, _, delta = _project(x, x_proj, dt_proj, x_dbl)
        d_xz, d_out = torch.empty_like(xz), torch.empty_like(delta)
        d_conv, d_delta, d_A, d_B, d_C, d_D = _scan_back(convolved, delta, A, B, C, D)
        gated = torch.empty_like(out)
        d_out_proj = torch.empty_like(out_proj)
        d_x_dbl = torch.empty_like(x_dbl)
        del gated, d_out, d_conv, d_delta, d_B, d_C, d_x_dbl
        return (
            d_xz, torch.zeros_like(conv), _like(conv_bias), torch.empty_like(x_proj), torch.empty_like(dt_proj),
            d_out_proj, _like(out_bias), d_A, d_D, _like(dt_bias),
        )  # fmt: skip


class _ChunkScan(torch.autograd.Function):
    """Source: mamba_ssm ops/triton/ssd_combined.py MambaChunkScanCombinedFn."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, dt_bias: Any, chunk: int
    ) -> torch.Tensor:
        B, C = _inner_contiguous(B), _inner_contiguous(C)
        out, sums = _chunk_scan(x, B, chunk)
        gated = None if z is None else torch.empty_like(out)
        ctx.save_for_backward(out, x, dt, sums, A, B, C, D, z, dt_bias)
        ctx.chunk = chunk
        return out if gated is None else gated

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        _, x, dt, _, A, B, C, D, z, dt_bias = ctx.saved_tensors
        d_B, d_C, d_x, d_dt = (torch.empty_like(one) for one in (B, C, x, dt))
        _chunk_scan_back(x, B, ctx.chunk)
        return d_x, d_dt, torch.empty_like(A), d_B, d_C, _like(D), _like(z), _like(dt_bias), None


class _SplitConvScan(torch.autograd.Function):
    """Source: mamba_ssm ops/triton/ssd_combined.py MambaSplitConv1dScanCombinedFn."""

    @staticmethod
    def forward(
        ctx: Any, whole: Any, conv: Any, conv_bias: Any, dt_bias: Any, A: Any, D: Any, norm: Any, out_proj: Any,
        out_bias: Any, chunk: int, head_dim: int, groups: int,
    ) -> torch.Tensor:  # fmt: skip
        x, B = _split_conv(whole, conv, D, head_dim, groups)
        out, _ = _chunk_scan(x, B, chunk)
        rows = out.shape[0] * out.shape[1]
        wide = out.new_empty(out.shape[0], out.shape[1], D.shape[0] * head_dim)
        deviations = None if norm is None else out.new_empty(groups * rows, dtype=torch.float32)
        dtype = _autocast_dtype(wide)
        out_proj = None if out_proj is None else out_proj.to(dtype)
        del x, B
        ctx.save_for_backward(whole, conv, conv_bias, out, A, D, dt_bias, norm, deviations, out_proj, out_bias)
        ctx.sizes = chunk, head_dim, groups
        return wide if out_proj is None else torch.nn.functional.linear(wide.to(dtype), out_proj, out_bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        whole, conv, conv_bias, out, A, D, dt_bias, norm, _, out_proj, out_bias = ctx.saved_tensors
        chunk, head_dim, groups = ctx.sizes
        recomputed = out.new_empty(out.shape[0], out.shape[1], D.shape[0] * head_dim)
        x, B = _split_conv(whole, conv, D, head_dim, groups)
        d_whole = torch.empty_like(whole)
        d_inner = whole.new_empty(*whole.shape[:2], conv.shape[0])
        d_out = recomputed if out_proj is None else torch.nn.functional.linear(gradient, out_proj.t())
        d_normed = None if norm is None else torch.empty_like(d_out)
        _chunk_scan_back(x, B, chunk)
        d_out_proj = None if out_proj is None else torch.empty_like(out_proj)
        del d_inner, d_normed
        return (
            d_whole, torch.empty_like(conv), _like(conv_bias), _like(dt_bias), torch.empty_like(A), _like(D),
            _like(norm), d_out_proj, _like(out_bias), None, None, None,
        )  # fmt: skip


class _GatedDelta(torch.autograd.Function):
    """Source: flash-linear-attention fla/ops/gated_delta_rule/chunk.py ChunkGatedDeltaRuleFunction."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, normalises: bool) -> torch.Tensor:
        q, k, v, g, beta = (one.contiguous() for one in (q, k, v, g, beta))
        deviations = None
        if normalises:
            q, k = torch.empty_like(q), torch.empty_like(k)
            deviations = q.new_empty(2, *q.shape[:-1], dtype=torch.float32)
        sums = torch.empty_like(g, dtype=torch.float32)
        wide = k.new_empty(*v.shape[:-1], _DELTA_CHUNK, dtype=torch.float32)
        solved = torch.empty_like(wide, dtype=k.dtype)
        del wide
        recomputed = _delta_states(k, v)
        out = torch.empty_like(v)
        del recomputed
        ctx.save_for_backward(q, k, v, sums, beta, solved, deviations, g)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        q, k, v, sums, beta, _, _, g = ctx.saved_tensors
        recomputed = _delta_states(k, v)
        d_values, d_states = torch.empty_like(v), torch.empty_like(recomputed[2])
        d_values_too = torch.empty_like(v)
        grouped = (*v.shape[:-1], k.shape[-1])
        d_q, d_k, d_w, d_k_too = (k.new_empty(grouped) for _ in range(4))
        d_sums = torch.empty_like(sums)
        del recomputed, d_values, d_states, d_w, d_k_too, d_sums
        if grouped != tuple(k.shape):
            d_q, d_k = torch.empty_like(q), torch.empty_like(k)
        return d_q, d_k, d_values_too, torch.empty_like(g), torch.empty_like(beta), None


def _scan(u: Any, delta: Any, A: Any, z: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    chunks = -(-u.shape[-1] // _SCAN_CHUNK)
    gated = None if z is None else torch.empty_like(z)
    out = torch.empty_like(delta)
    return out, u.new_empty(u.shape[0], u.shape[1], chunks, 2 * A.shape[1], dtype=A.dtype), gated


def _scan_back(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> tuple[torch.Tensor | None, ...]:
    d_u, d_delta, d_A = torch.empty_like(u), torch.empty_like(delta), torch.zeros_like(A)
    wide = [torch.zeros_like(one, dtype=torch.float32) for one in (B, C)]
    return d_u, d_delta, d_A, wide[0].to(B.dtype), wide[1].to(C.dtype), _like(D)


def _project(x: Any, x_proj: Any, dt_proj: Any, x_dbl: Any = None) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """The convolution, and the step sizes computed from it."""
    convolved = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x_dbl is None:
        rows = convolved.transpose(1, 2).reshape(-1, x.shape[1])
        x_dbl = torch.nn.functional.linear(rows, x_proj)
    delta = dt_proj @ x_dbl[:, : dt_proj.shape[1]].t()
    return convolved, x_dbl, delta.view(x.shape[1], x.shape[0], -1).transpose(0, 1)


def _chunk_scan(x: Any, B: Any, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Source: ssd_combined.py _mamba_chunk_scan_combined_fwd; fp32 states, then the states passed on."""
    sums, steps, states, passed, final = _states(x, B, chunk)
    del states
    pairs = _pairs(x, B, chunk)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    del steps, passed, final, pairs
    return out, sums


def _chunk_scan_back(x: Any, B: Any, chunk: int) -> None:
    """Source: ssd_combined.py _mamba_chunk_scan_combined_bwd."""
    sums, steps, states, passed, final = _states(x, B, chunk)
    pairs = _pairs(x, B, chunk)
    del states, final
    d_states = torch.empty_like(passed)
    d_passed, copied = torch.empty_like(passed), torch.empty_like(passed)
    del d_states
    d_steps = torch.empty_like(steps)
    d_wide = [torch.empty(B.shape, dtype=torch.float32, device=x.device) for _ in range(2)]
    d_pairs = torch.empty_like(pairs)
    del sums, steps, passed, pairs, d_passed, copied, d_steps, d_wide, d_pairs


def _states(x: Any, B: Any, chunk: int) -> tuple[torch.Tensor, ...]:
    batch, length, heads, width = x.shape
    chunks = -(-length // chunk)
    sums, steps = (x.new_empty(batch, heads, chunks, chunk, dtype=torch.float32) for _ in range(2))
    states = x.new_empty(batch, chunks, heads, width, B.shape[-1], dtype=torch.float32)
    passed = torch.empty_like(states, dtype=B.dtype)
    return sums, steps, states, passed, x.new_empty(batch, heads, width, B.shape[-1], dtype=torch.float32)


def _pairs(x: Any, B: Any, chunk: int) -> torch.Tensor:
    chunks = -(-x.shape[1] // chunk)
    return x.new_empty(x.shape[0], chunks, B.shape[2], chunk, chunk, dtype=torch.float32)


def _split_conv(whole: Any, conv: Any, D: Any, head_dim: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    heads = D.shape[0]
    convolved = whole.new_empty(*whole.shape[:2], conv.shape[0])
    states = (conv.shape[0] - heads * head_dim) // groups // 2
    x, B, _ = convolved.split([heads * head_dim, groups * states, groups * states], dim=-1)
    return x.unflatten(-1, (heads, head_dim)), B.unflatten(-1, (groups, states))


def _delta_states(k: Any, v: Any) -> tuple[torch.Tensor, ...]:
    """Source: fla/ops/gated_delta_rule/wy_fast.py recompute_w_u_fwd; fla/ops/common/chunk_delta_h.py."""
    w, u = k.new_empty(*v.shape[:-1], k.shape[-1]), torch.empty_like(v)
    chunks = -(-v.shape[1] // _DELTA_CHUNK)
    states = k.new_empty(v.shape[0], chunks, v.shape[2], k.shape[-1], v.shape[-1])
    return w, u, states, torch.empty_like(v)


def _like(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else torch.empty_like(tensor)


def _inner_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.stride(-1) == 1 or (tensor.dim() > 1 and tensor.stride(-2) == 1):
        return tensor
    return tensor.contiguous()


def _autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tensor.dtype


def _causal_conv(hidden_states: Any, weight: Any, bias: Any = None, activation: Any = None, **_: Any) -> torch.Tensor:
    return _CausalConv.apply(hidden_states, weight, bias)  # type: ignore[no-any-return]


def _selective_scan(
    hidden_states: Any, dt: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, delta_bias: Any = None,
    return_last_state: bool = False, **_: Any,
) -> Any:  # fmt: skip
    out = _SelectiveScan.apply(hidden_states, dt, A, B, C, D, z, delta_bias)
    return (out, None) if return_last_state else out


def _mamba_inner(
    xz: Any, conv: Any, conv_bias: Any, x_proj: Any, dt_proj: Any, out_proj: Any, out_bias: Any, A: Any,
    B: Any = None, C: Any = None, D: Any = None, delta_bias: Any = None, **_: Any,
) -> torch.Tensor:  # fmt: skip
    return _MambaInner.apply(  # type: ignore[no-any-return]
        xz, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, D, delta_bias
    )


def _mamba_chunk_scan(
    x: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: int, D: Any = None, z: Any = None, dt_bias: Any = None,
    return_final_states: bool = False, **_: Any,
) -> Any:  # fmt: skip
    out = _ChunkScan.apply(x, dt, A, B, C, D, z, dt_bias, chunk_size)
    return (out, None) if return_final_states else out


def _mamba_split_conv_scan(
    zxbcdt: Any, conv: Any, conv_bias: Any, dt_bias: Any, A: Any, D: Any, chunk_size: int,
    rmsnorm_weight: Any = None, outproj_weight: Any = None, outproj_bias: Any = None, headdim: int = 64,
    ngroups: int = 1, **_: Any,
) -> torch.Tensor:  # fmt: skip
    return _SplitConvScan.apply(  # type: ignore[no-any-return]
        zxbcdt, conv, conv_bias, dt_bias, A, D, rmsnorm_weight, outproj_weight, outproj_bias, chunk_size, headdim,
        ngroups,
    )  # fmt: skip


def _gated_delta(
    query: Any, key: Any, value: Any, g: Any, beta: Any, use_qk_l2norm_in_kernel: bool = False,
    output_final_state: bool = False, **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """A model inside another keeps a cache in training: the trainer switches it off in the outer config alone."""
    out = _GatedDelta.apply(query, key, value, g, beta, use_qk_l2norm_in_kernel)
    batch, _length, heads, width = value.shape
    shape = batch, heads, key.shape[-1], width
    return out, key.new_empty(shape, dtype=torch.float32) if output_final_state else None


_STAND_INS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _causal_conv,
    "selective_scan_fn": _selective_scan,
    "mamba_inner_fn": _mamba_inner,
    "mamba_chunk_scan_combined": _mamba_chunk_scan,
    "mamba_split_conv1d_scan_combined": _mamba_split_conv_scan,
    "chunk_gated_delta_rule": _gated_delta,
}
_NOT_IN_TRAINING = ("update", "recurrent")


@contextlib.contextmanager
def kernel_packages(model: torch.nn.Module) -> Iterator[list[str]]:
    """Replace the functions of kernel packages that a model's code calls, and yield what to say about it."""
    found = list(_find_kernels(model))
    for module, name, function, _ in found:
        if function in _STAND_INS:
            setattr(module, name, _STAND_INS[function])
    try:
        yield _describe(found)
    finally:
        for module, name, function, original in found:
            if function in _STAND_INS:
                setattr(module, name, original[0])


def _find_kernels(model: torch.nn.Module) -> Iterator[tuple[ModuleType, str, str, tuple[FunctionType, str]]]:
    """Yield functions that transformers takes from a package if it is there.

    Source: transformers integrations/hub_kernels.py use_kernel_func_from_hub_with_fallback.
    """
    modules = {type(one).__module__ for one in model.modules()}
    for module in (sys.modules[name] for name in sorted(modules) if name in sys.modules):
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and value.__closure__ and "torch_function" in value.__code__.co_freevars:
                inner = inspect.getclosurevars(value).nonlocals
                yield module, name, str(inner["func_name"]), (value, str(inner["package"]))


def _describe(found: list[tuple[ModuleType, str, str, tuple[FunctionType, str]]]) -> list[str]:
    packages = {_PACKAGES.get(one[1], one[1]) for _, _, function, one in found if function in _STAND_INS}
    notes = [f"{name} is taken to be installed: its kernels keep what their source says" for name in packages]
    for _, _, function, (_, package) in found:
        if function not in _STAND_INS and not any(word in function for word in _NOT_IN_TRAINING):
            notes.append(f"{function} of {_PACKAGES.get(package, package)} runs as transformers' own PyTorch code")
    return sorted(set(notes))

"""Packages of fused layer kernels put in the place of a model's own norms, rotary embeddings and gates.

Modules are recognised by their structure. A function that a module's code calls by name is replaced in a copy of that
code: nothing outside this model changes.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from brim.errors import ProbeFailed
from brim.probes.layer_kernels import FusedGate, FusedRmsNorm, FusedRotary
from brim.spec.strategy import LayerKernels, Strategy
from brim.tables.read import find_kernels

_ROTARY = "apply_rotary_pos_emb"
_PLAIN_MLP = frozenset({"down_proj", "act_fn", "gate_proj", "up_proj"})
_JOINT_MLP = frozenset({"down_proj", "activation_fn", "act_fn", "gate_up_proj", "chunk"})
_ACTIVATIONS = ("silu", "gelu")
_NORMS_OF_SUMMANDS = ("post_feedforward_layernorm", "post_mlp_layernorm")


def fuse_layers(model: torch.nn.Module, strategy: Strategy) -> None:
    """Replace what the strategy's package of kernels replaces: norms, rotary embeddings, gated activations.

    Raises:
        ProbeFailed: the package finds nothing to replace.
    """
    kernels = find_kernels(strategy.layer_kernels)
    if kernels.name == "none":
        return
    found = 0
    if kernels.norm:
        found += _fuse_norms(model, strategy.layer_kernels)
    if kernels.rotary:
        found += _fuse_rotary(model, strategy.layer_kernels)
    if kernels.gate == "always":
        found += _fuse_gates(model)
    if not found:
        text = f"layer kernels {kernels.name} find nothing to replace in {type(model).__name__}; trace it with none"
        raise ProbeFailed(text)


def _fuse_norms(model: torch.nn.Module, kernels: LayerKernels) -> int:
    """A gradient is overwritten unless a sum of the residual stream needs it too, as where branches end in a norm.

    Source: Liger-Kernel transformers/rms_norm.py (in_place=False for Gemma 2 and 3, OLMo 2, GLM 4); fms-acceleration
    fms_acceleration_foak kernels/unsloth/rms_layernorm.py backward returns no gradient of the weight.
    """
    norms = [module for module in model.modules() if _is_rms_norm(module)]
    in_place = not any(name.endswith(_NORMS_OF_SUMMANDS) for name, _ in model.named_modules())

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return FusedRmsNorm.apply(x, self.weight, in_place, kernels != "foak")

    for norm in norms:
        norm.forward = types.MethodType(forward, norm)  # type: ignore[method-assign]
    return len(norms)


def _is_rms_norm(module: torch.nn.Module) -> bool:
    """Whether a module is an RMS norm with a weight and nothing else: no gate, no bias."""
    name = type(module).__name__.lower()
    parameters = list(module._parameters)
    has_eps = any(hasattr(module, word) for word in ("variance_epsilon", "eps"))
    return "rmsnorm" in name and "gated" not in name and parameters == ["weight"] and has_eps


def _fuse_rotary(model: torch.nn.Module, kernels: LayerKernels) -> int:
    """Give every module that rotates queries and keys code that calls the kernel."""
    copies: dict[Any, Any] = {}
    found = 0
    for module in model.modules():
        code = inspect.unwrap(type(module).forward)
        if _rotates(code):
            if code not in copies:
                copies[code] = _copy_code(code, _ROTARY, _rotate_in_place(kernels != "unsloth"))
            module.forward = types.MethodType(copies[code], module)  # type: ignore[method-assign]
            found += 1
    return found


def _rotates(code: Any) -> bool:
    if not inspect.isfunction(code) or _ROTARY not in code.__code__.co_names or _ROTARY not in code.__globals__:
        return False
    known = list(inspect.signature(code.__globals__[_ROTARY]).parameters)
    return known[:4] == ["q", "k", "cos", "sin"]


def _rotate_in_place(backward_in_place: bool) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if unsqueeze_dim == 1:
            return FusedRotary.apply(q, k, cos, sin, backward_in_place)
        made = FusedRotary.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin, backward_in_place)
        return made[0].transpose(1, 2), made[1].transpose(1, 2)

    return rotate


def _copy_code(code: Any, name: str, replacement: Callable[..., Any]) -> Any:
    """Return a function whose global `name` is another one."""
    copied = types.FunctionType(
        code.__code__, {**code.__globals__, name: replacement}, code.__name__, code.__defaults__, code.__closure__
    )
    copied.__kwdefaults__ = code.__kwdefaults__
    return copied


def _fuse_gates(model: torch.nn.Module) -> int:
    """Source: Liger-Kernel transformers/swiglu.py LigerSwiGLUMLP, LigerPhi3SwiGLUMLP; geglu.py LigerGEGLUMLP."""
    found = 0
    for module in model.modules():
        if is_gated_mlp(module):
            module.forward = types.MethodType(_gate, module)  # type: ignore[method-assign]
        elif _has_code_of(module, _JOINT_MLP, "gate_up_proj"):
            module.forward = types.MethodType(_gate_joint, module)  # type: ignore[method-assign]
        else:
            continue
        found += 1
    return found


def is_gated_mlp(module: torch.nn.Module) -> bool:
    """Whether a module is `down_proj(act_fn(gate_proj(x)) * up_proj(x))` with a SiLU or GELU, and nothing else."""
    return _has_code_of(module, _PLAIN_MLP, "gate_proj")


def _has_code_of(module: torch.nn.Module, names: frozenset[str], needed: str) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or needed not in code.co_names or not names.issuperset(code.co_names):
        return False
    activation = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    return any(word in type(activation).__name__.lower() for word in _ACTIVATIONS)


def _gate(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(FusedGate.apply(self.gate_proj(x), self.up_proj(x)))


def _gate_joint(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(FusedGate.apply(gate, up))

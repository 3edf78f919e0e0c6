"""Tapes of feed-forward blocks: matrices, activation functions, gates."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from brim.cost.dropout_masks import drop_out
from brim.cost.projection import FUSED_GATE, project
from brim.cost.setting import Setting
from brim.cost.tape import ZERO, Tape, Tensor, per_token
from brim.spec.model import Mlp


class _Activation(NamedTuple):
    """What an activation function keeps: its input, its output, copies of its own."""

    keeps_input: bool = True
    keeps_output: bool = False
    copies: int = 0
    widens: bool = False
    """Whether it has a power, which autocast runs in fp32, and with it everything after."""


# Source: transformers activations.py. F.gelu, F.silu and their like are one kernel that keeps its input; those
# written out in Python keep more.
_TANH_GELUS = ("gelu_new", "gelu_accurate", "gelu_python_tanh")
_ACTIVATIONS = {
    "relu": _Activation(keeps_input=False, keeps_output=True),
    "relu2": _Activation(keeps_input=False, copies=1, widens=True),
    "tanh": _Activation(keeps_input=False, keeps_output=True),
    "sigmoid": _Activation(keeps_input=False, keeps_output=True),
    "gelu_fast": _Activation(copies=6), "gelu_python": _Activation(keeps_input=False, copies=3),
    "gelu_10": _Activation(copies=1), "quick_gelu": _Activation(copies=1), "mish": _Activation(copies=2),
}  # fmt: skip
_ONE_KERNEL = _Activation()


def feed_dense(tape: Tape, mlp: Mlp, setting: Setting, x: Tensor) -> Tensor:
    """Record a dense feed-forward block."""
    made = [project(tape, x, linear, setting) for linear in mlp.linears[:-1]]
    element = made[0].size.per_token // mlp.linears[0].out_features
    inner = combine(tape, made, mlp.intermediate_size, mlp.gated, mlp.hidden_act, setting, element=element)
    inner = drop_out(tape, inner, mlp.intermediate_size, setting.dropout.activation_dropout)
    widened = per_token(setting.weight_bytes * mlp.intermediate_size)
    if setting.code.widens_inner and inner.size.per_token < widened.per_token:
        inner = tape.op("inner cast", [inner], widened)
    out = project(tape, inner, mlp.linears[-1], setting)
    if setting.fused_gate and setting.fused_adapters:
        _hold_inner_gradient(tape, made, inner)
    tape.hold(x, *(made if len(made) == 1 and mlp.gated else ()))  # models/phi3 Phi3MLP.forward: `gate` is a view
    return out


def _hold_inner_gradient(tape: Tape, made: list[Tensor], inner: Tensor) -> None:
    """The whole block goes back in one function, which has the inner gradient in a variable until it returns.

    Source: unsloth kernels/fast_lora.py LoRA_MLP.backward.
    """
    for op in tape.ops:
        if any(op.output is tensor for tensor in made):
            op.grad_scratch = op.grad_scratch + inner.size


def combine(
    tape: Tape, made: list[Tensor], width: int, gated: bool, act: str, setting: Setting, *,
    element: int, tokens: Fraction | int = 1,
) -> Tensor:  # fmt: skip
    """Record what lies between the projections and the last matrix: activation function and gate.

    Args:
        made: gate and up projection, one tensor of both, or the only one.
        element: bytes of an element.
    """
    out = per_token(round(element * width * tokens))
    if gated and setting.fused_gate:
        return tape.op(FUSED_GATE, made, out, saves=made, grad_in_place=True)
    if not gated:
        return activate(tape, made[0], round(width * tokens), act, setting, element)
    active = activate(tape, made[0], round(width * tokens), act, setting, element)
    return tape.op("gate", [active, made[-1]], active.size, saves=[active, made[-1]])


def activate(tape: Tape, x: Tensor, width: int, act: str, setting: Setting, element: int) -> Tensor:
    """Record an activation function over `width` elements a token of `element` bytes."""
    if act in _TANH_GELUS:
        return _tanh_gelu(tape, x, width, setting, element)
    kind = _ACTIVATIONS.get(act, _ONE_KERNEL)
    wide = 4 if kind.widens and setting.autocast else element
    saves = []
    if wide > element:
        x = tape.op(f"{act} cast", [x], per_token(wide * width))
    for _ in range(kind.copies):
        saves.append(tape.op(f"{act} copy", (), per_token(wide * width), saves_output=True, needs_grad=True))
    if kind.keeps_input:
        saves.append(x)
    return tape.op(act, [x], per_token(wide * width), saves=saves, saves_output=kind.keeps_output)


def _tanh_gelu(tape: Tape, x: Tensor, width: int, setting: Setting, element: int) -> Tensor:
    """GELU written out with a power and a tanh: 0.5 * x * (1 + tanh(k * (x + 0.044715 * x ** 3))).

    Source: transformers activations.py NewGELUActivation; autocast runs the power, and what follows from it, in fp32.
    """
    wide = 4 if setting.autocast else element
    out, narrow = per_token(wide * width), per_token(element * width)
    base = tape.op("gelu cast", [x], out) if wide > element else x
    cube = tape.op("gelu cube", [base], out, saves=[base], grad_scratch=out.times(2))
    cube = tape.op("gelu cube scale", [cube], out)
    inner = tape.op("gelu inner sum", [x, cube], out, passes_grad=wide == element)
    inner = tape.op("gelu inner scale", [inner], out)
    soft = tape.op("gelu tanh", [inner], out, saves_output=True)
    soft = tape.op("gelu one plus", [soft], out, passes_grad=True)
    half = tape.op("gelu half", [x], narrow)
    # both gradients are made in fp32 before the narrow factor's is cast
    widened = out.times(2) + narrow if wide > element else ZERO
    return tape.op("gelu", [half, soft], out, saves=[half, soft], grad_scratch=widened)

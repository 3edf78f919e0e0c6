"""Tapes of feed-forward blocks: matrices, activation functions, gates."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from brim.cost.projection import project
from brim.cost.setting import Setting
from brim.cost.tape import Tape, Tensor, per_token
from brim.spec.model import Mlp


class _Activation(NamedTuple):
    """What an activation function keeps: its input, its output, copies in its own dtype, copies in the input's."""

    keeps_input: bool = True
    keeps_output: bool = False
    copies: int = 0
    narrow_copies: int = 0
    widens: bool = False
    """Whether it has a power, which autocast runs in fp32, and with it everything after."""


# Source: transformers activations.py. F.gelu, F.silu and their like are one kernel that keeps its input; those
# written out in Python keep more.
_TANH_GELU = _Activation(copies=2, narrow_copies=1, widens=True)
_ACTIVATIONS = {
    "relu": _Activation(keeps_input=False, keeps_output=True),
    "relu2": _Activation(keeps_input=False, copies=1, widens=True),
    "tanh": _Activation(keeps_input=False, keeps_output=True),
    "sigmoid": _Activation(keeps_input=False, keeps_output=True),
    "gelu_new": _TANH_GELU, "gelu_accurate": _TANH_GELU, "gelu_python_tanh": _TANH_GELU,
    "gelu_fast": _Activation(copies=6), "gelu_python": _Activation(keeps_input=False, copies=3),
    "gelu_10": _Activation(copies=1), "quick_gelu": _Activation(copies=1), "mish": _Activation(copies=2),
}  # fmt: skip
_ONE_KERNEL = _Activation()


def feed_dense(tape: Tape, mlp: Mlp, setting: Setting, x: Tensor) -> Tensor:
    """Record a dense feed-forward block."""
    made = [project(tape, x, linear, setting) for linear in mlp.linears[:-1]]
    inner = combine(tape, made, mlp.intermediate_size, mlp.gated, mlp.hidden_act, setting)
    widened = per_token(setting.weight_bytes * mlp.intermediate_size)
    if setting.code.widens_inner and inner.size.per_token < widened.per_token:
        inner = tape.op("inner cast", [inner], widened)
    return project(tape, inner, mlp.linears[-1], setting)


def combine(
    tape: Tape, made: list[Tensor], width: int, gated: bool, act: str, setting: Setting, *,
    tokens: Fraction | int = 1, element: int | None = None,
) -> Tensor:  # fmt: skip
    """Record what lies between the projections and the last matrix: activation function and gate.

    Args:
        made: gate and up projection, one tensor of both, or the only one.
        element: bytes of an element; the compute dtype's if None.
    """
    element = element or setting.compute_bytes
    out = per_token(round(element * width * tokens))
    if gated and setting.fused_gate:
        return tape.op("gated activation", made, out, saves=made)
    if not gated:
        return activate(tape, made[0], round(width * tokens), act, setting, element)
    active = activate(tape, made[0], round(width * tokens), act, setting, element)
    return tape.op("gate", [active, made[-1]], active.size, saves=[active, made[-1]])


def activate(tape: Tape, x: Tensor, width: int, act: str, setting: Setting, element: int) -> Tensor:
    """Record an activation function over `width` elements a token of `element` bytes."""
    kind = _ACTIVATIONS.get(act, _ONE_KERNEL)
    wide = 4 if kind.widens and setting.autocast else element
    saves = []
    if wide > element:
        x = tape.op(f"{act} cast", [x], per_token(wide * width))
    for _ in range(kind.copies):
        saves.append(tape.op(f"{act} copy", (), per_token(wide * width), saves_output=True, needs_grad=True))
    for _ in range(kind.narrow_copies):
        saves.append(tape.op(f"{act} copy", (), per_token(element * width), saves_output=True, needs_grad=True))
    if kind.keeps_input:
        saves.append(x)
    return tape.op(act, [x], per_token(wide * width), saves=saves, saves_output=kind.keeps_output)



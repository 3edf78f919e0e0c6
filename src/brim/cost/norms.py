"""Tapes of normalisations, as transformers and torch write them."""

from __future__ import annotations

from brim.cost.setting import Setting, norm_is_fused
from brim.cost.tape import Tape, Tensor, fixed, per_token
from brim.spec.model import NormKind


def normalise(tape: Tape, x: Tensor, width: int, kind: NormKind, setting: Setting, *, parts: int = 1) -> Tensor:
    """Record a normalisation over `width` elements a token, in `parts` normalised apart, and return its output."""
    if norm_is_fused(kind, setting):
        return _fused(tape, x, width, kind, setting, parts)
    return _written_out(tape, x, width, setting, parts)


def _element_bytes(x: Tensor, width: int, setting: Setting) -> int:
    """Bytes of an element of the input; one wider than `width` is a fused projection."""
    return x.size.per_token // width if x.size.per_token in (2 * width, 4 * width) else setting.compute_bytes


def _fused(tape: Tape, x: Tensor, width: int, kind: NormKind, setting: Setting, parts: int) -> Tensor:
    """One kernel, which keeps its input and a mean or scale or two; under autocast layer_norm runs in fp32.

    Source: aten native_layer_norm; aten/src/ATen/autocast_mode.h AT_FORALL_FP32; Liger-Kernel ops/rms_norm.py.
    """
    element, saved = _element_bytes(x, width, setting), []
    if kind == "layernorm" and setting.autocast:
        if setting.residual_bytes < 4:
            saved = [tape.op("norm weight copy", (), fixed(4 * width), saves_output=True, needs_grad=True)]
        if element < 4:
            element, x = 4, tape.op("norm cast", [x], per_token(4 * width))
    statistics = per_token((8 if kind == "layernorm" else 4) * parts)
    saved.append(tape.op("norm statistics", (), statistics, saves_output=True, needs_grad=True))
    return tape.op("norm", [x], per_token(element * width), saves=[x, *saved], grad_scratch=per_token(8))


def _written_out(tape: Tape, x: Tensor, width: int, setting: Setting, parts: int) -> Tensor:
    """An RMS norm in Python: an fp32 copy is kept for the mean of squares and the product, and its scale.

    Source: models/llama LlamaRMSNorm, gemma GemmaRMSNorm, olmo2 Olmo2RMSNorm, t5 T5LayerNorm. A trained weight keeps
    the normalised value as well, in the dtype it meets it in.
    """
    element, product, trains = _element_bytes(x, width, setting), setting.code.norm_product, setting.trains_base
    wide = x if element == 4 else tape.op("norm fp32", [x], per_token(4 * width))
    scale = tape.op("norm statistics", (), per_token(4 * parts), saves_output=True, needs_grad=True)
    beside = [x] if product == "unwidened" else []
    scaled = tape.op(
        "norm scale", [wide], per_token(4 * width), saves=[wide, scale, *beside],
        scratch=per_token(4 * width), grad_scratch=per_token(12 * width),
    )  # fmt: skip
    if product in ("wide", "offset"):
        return _wide_product(tape, scaled, width, parts, element, setting)
    narrow = scaled if element == 4 else tape.op("norm cast", [scaled], per_token(element * width))
    out = per_token(max(element, setting.residual_bytes) * width)
    return tape.op("norm", [narrow], out, saves=[narrow] if trains else ())


def _wide_product(tape: Tape, scaled: Tensor, width: int, parts: int, element: int, setting: Setting) -> Tensor:
    """The weight times the fp32 value, cast back after."""
    saved = [scaled] if setting.trains_base else []
    if setting.code.norm_product == "offset":
        saved.append(tape.op("norm weight copy", (), fixed(4 * width // parts), saves_output=True, needs_grad=True))
    out = tape.op("norm product", [scaled], per_token(4 * width), saves=saved)
    return out if element == 4 else tape.op("norm", [out], per_token(element * width))

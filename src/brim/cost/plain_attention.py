"""The tape of attention by plain products, which PyTorch falls back to on a card: every score is kept in fp32."""

from __future__ import annotations

from brim.cost.dropout_masks import drop_out
from brim.cost.setting import Setting
from brim.cost.tape import ZERO, Tape, Tensor, fixed, per_token
from brim.spec.model import Attention

_WIDE = 4


def attend_plainly(
    tape: Tape, attention: Attention, setting: Setting, inputs: tuple[Tensor, Tensor, Tensor], *,
    grouped: bool, key_heads: int, mask_heads: int,
) -> Tensor:  # fmt: skip
    """Record the kernel and what follows it, and return attention's result.

    Args:
        tape: the layer's tape.
        attention: the attention block.
        setting: precision and length.
        inputs: queries, keys and values.
        grouped: whether keys and values are repeated to all heads inside, rather than spread by the product.
        key_heads: heads that keys and values come with.
        mask_heads: heads of the mask that is made for the call, 0 if none is made.

    Source: aten/src/ATen/native/transformers/attention.cpp _scaled_dot_product_attention_math; transformers
    integrations/sdpa_attention.py: the result has other strides than a fused kernel's, so `contiguous` copies it.
    """
    heads, seen = attention.num_attention_heads, attention.num_attention_heads * setting.attended_len
    out_bytes, copied = setting.compute_bytes * attention.out_size, setting.compute_bytes < _WIDE
    mask = _mask(tape, setting, mask_heads, causal=attention.causal)
    sizes = (attention.q_size, attention.q_size // heads * key_heads, attention.out_size // heads * key_heads)
    query, key, value = wide = tuple(
        tape.op("attention widen", [one], per_token(_WIDE * size)) if copied else one
        for one, size in zip(inputs, sizes, strict=True)
    )
    query = tape.op("attention scale", [query], per_token(_WIDE * attention.q_size))
    if grouped:
        key, value = _spread(tape, attention, key, value)
        sizes = (attention.q_size, attention.q_size, attention.out_size)
    repeated = (key, value)
    key = tape.op("attention scale", [key], per_token(_WIDE * sizes[1]))
    if key_heads < heads and not grouped:
        key = tape.op("expanded keys", [key], per_token(_WIDE * attention.q_size))
    scores = tape.op("scores", [query, key], per_token(_WIDE * seen), saves=[query, key])
    soft = tape.op(
        "softmax", [scores], per_token(_WIDE * seen), saves_output=True, scratch=per_token(seen + heads)
    )  # fmt: skip
    soft = drop_out(tape, soft, seen, setting.dropout.attention_dropout)
    unread = tape.op("softmax cast", (), per_token(setting.compute_bytes * seen) if copied else ZERO, needs_grad=False)
    if key_heads < heads and not grouped:
        value = tape.op("expanded values", [value], per_token(_WIDE * attention.out_size))
    out = tape.op("attention", [soft, value], per_token(_WIDE * attention.out_size), saves=[soft, value])
    if copied:
        out = tape.op("attention cast", [out], per_token(out_bytes))
    tape.hold(*mask, *wide, *repeated, unread)
    return tape.op("attention transpose", [out], per_token(out_bytes))


def _spread(tape: Tape, attention: Attention, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    key = tape.op("repeat keys", [key], per_token(_WIDE * attention.q_size))
    return key, tape.op("repeat values", [value], per_token(_WIDE * attention.out_size))


def _mask(tape: Tape, setting: Setting, heads: int, *, causal: bool) -> list[Tensor]:
    """The mask made for this call: what was given, in the compute dtype; a causal pattern where none was, in fp32."""
    if heads:
        size = per_token(setting.compute_bytes * setting.attended_len * heads)
    elif causal and not setting.code.always_masks:
        size = fixed(_WIDE * setting.attended_len**2)
    else:
        return []
    return [tape.op("attention mask", (), size, needs_grad=False)]

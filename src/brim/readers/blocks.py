"""Attention and feed-forward blocks from names and sizes, for every reader."""

from __future__ import annotations

from brim.readers.config_fields import ConfigFields
from brim.spec.model import Attention, Linear, Mlp


def even_head_dim(
    fields: ConfigFields, hidden_size: int, num_heads: int, key: str = "num_attention_heads", width: str = "hidden_size"
) -> int:
    """Return hidden width over heads.

    Raises:
        InvalidConfig: the heads do not divide the width.
    """
    if hidden_size % num_heads:
        fields.refuse(key, f"{num_heads} does not divide {width} {hidden_size}")
    return hidden_size // num_heads


def full_attention(
    *,
    names: tuple[str, ...],
    hidden_size: int,
    num_heads: int,
    head_dim: int,
    bias: bool = False,
    output_bias: bool | None = None,
    causal: bool = False,
    rotary: bool = False,
    sliding_window: int | None = None,
    other_parameters: int = 0,
) -> Attention:
    """Return attention with as many key/value heads as query heads.

    Args:
        names: the matrices' names: query, key, value, output; or fused, output.
        bias: whether query, key and value have biases.
        output_bias: whether the output projection has one; None means as `bias`.
    """
    *inner, out = names
    width = num_heads * head_dim
    fused = 3 // len(inner)
    return Attention(
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        linears=(
            *(Linear(name=name, in_features=hidden_size, out_features=fused * width, bias=bias) for name in inner),
            Linear(
                name=out,
                in_features=width,
                out_features=hidden_size,
                bias=bias if output_bias is None else output_bias,
            ),
        ),
        causal=causal,
        rotary=rotary,
        sliding_window=sliding_window,
        other_parameters=other_parameters,
    )


def named_mlp(
    *,
    names: tuple[str, ...],
    hidden_size: int,
    intermediate_size: int,
    hidden_act: str,
    bias: bool = False,
    gated: bool = False,
) -> Mlp:
    """Return a feed-forward block; a gated one with two names has gate and up fused in the first matrix."""
    *inner, out = names
    width = 2 * intermediate_size if gated and len(inner) == 1 else intermediate_size
    return Mlp(
        intermediate_size=intermediate_size,
        gated=gated,
        hidden_act=hidden_act,
        linears=(
            *(Linear(name=name, in_features=hidden_size, out_features=width, bias=bias) for name in inner),
            Linear(name=out, in_features=intermediate_size, out_features=hidden_size, bias=bias),
        ),
    )

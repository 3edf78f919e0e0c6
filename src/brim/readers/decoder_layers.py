"""Which layers of a decoder see a sliding window, rotate positions, or hold experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from brim.readers.config_fields import LARGEST_NUM_EXPERTS, ConfigFields
from brim.readers.decoder_facts import DecoderFacts

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What distinguishes one layer of a stack from another."""

    sliding_window: int | None = None
    """Tokens each query sees, or None for all."""
    rotary: bool = True
    """Whether positions are rotated."""
    sparse: bool = False
    """Whether the feed-forward block is a mixture of experts."""


def layer_kinds(fields: ConfigFields, facts: DecoderFacts) -> list[LayerKind]:
    """Return the kind of every layer, in order.

    Raises:
        InvalidConfig: a list of the wrong length or content.
        UnsupportedModel: a kind of attention that is not known.
    """
    num_layers = fields.num_layers()
    window = _window(fields) if facts.window != "none" and fields.flag(facts.window_if) else None
    rotated = _rotated(fields, num_layers) if facts.window == "unrotated" else [True] * num_layers
    sliding = [window is not None and kind == _SLIDING for kind in layer_types(fields, facts, num_layers, rotated)]
    sparse = _sparse(fields, facts, num_layers)
    return [
        LayerKind(sliding_window=window if slides else None, rotary=rotates, sparse=has_experts)
        for slides, rotates, has_experts in zip(sliding, rotated, sparse, strict=True)
    ]


def layer_types(
    fields: ConfigFields, facts: DecoderFacts, num_layers: int, rotated: Sequence[bool] = ()
) -> Sequence[str]:
    """Return `layer_types` as given where the architecture reads it, else by the architecture's rule."""
    listed = None if facts.window in ("none", "all") else listed_layer_types(fields, num_layers)
    if listed is not None:
        return listed
    return [_SLIDING if _slides(fields, facts, layer, rotated) else _FULL for layer in range(num_layers)]


def listed_layer_types(fields: ConfigFields, num_layers: int) -> Sequence[str] | None:
    """Return `layer_types` as given, or None.

    Raises:
        InvalidConfig: not one text per layer.
        UnsupportedModel: a kind of attention other than full and sliding.
    """
    listed = fields.listing("layer_types", length=num_layers)
    for kind in listed or ():
        if not isinstance(kind, str):
            fields.refuse("layer_types", "must hold texts")
        if kind not in (_FULL, _SLIDING):
            fields.unsupported(f"layer type {kind[:40]}")
    return listed


def _slides(fields: ConfigFields, facts: DecoderFacts, layer: int, rotated: Sequence[bool]) -> bool:
    """Return whether a layer slides by the architecture's default rule (`__post_init__` of its config class)."""
    match facts.window:
        case "none":
            return False
        case "all" | "listed":
            return True
        case "late":
            return layer >= fields.number("max_window_layers", at_least=0)
        case "early_even":
            return layer % 2 == 0 and layer < fields.number("max_window_layers", at_least=0)
        case "unrotated":
            return not rotated[layer]
        case "periodic":
            period = facts.window_period
            return (layer + 1) % (period if isinstance(period, int) else fields.number(period)) != 0


def _window(fields: ConfigFields) -> int | None:
    """Return tokens each query sees in a sliding layer, or None; 0 is how Qwen2-MoE saves "none"."""
    return fields.optional_number("sliding_window", at_least=0) or None


def _rotated(fields: ConfigFields, num_layers: int) -> list[bool]:
    """Return for every layer whether it rotates positions (SmolLM3's `no_rope_layers`: 1 means it does)."""
    listed = fields.listing("no_rope_layers", length=num_layers)
    if listed is None:
        interval = fields.number("no_rope_layer_interval")
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    return [bool(fields.entry("no_rope_layers", int(item) if item is True else item, at_least=0)) for item in listed]


def _sparse(fields: ConfigFields, facts: DecoderFacts, num_layers: int) -> list[bool]:
    """Return for every layer whether it holds experts."""
    experts = facts.experts
    if experts is None:
        return [False] * num_layers
    if experts.sparse == "after_dense":
        first = fields.number("first_k_dense_replace", at_least=0)
        return [layer >= first for layer in range(num_layers)]
    if experts.sparse == "all":
        return [True] * num_layers
    if fields.number("num_experts", at_least=0, at_most=LARGEST_NUM_EXPERTS) == 0:
        return [False] * num_layers
    step = fields.number("decoder_sparse_step")
    listed = fields.listing("mlp_only_layers") or ()
    dense = {fields.entry("mlp_only_layers", item, at_least=0) for item in listed}
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)]

"""Gemma 4's text model: shared keys and values, per-layer inputs, experts beside a dense block.

Source: transformers 5.23 `models/gemma4/modeling_gemma4.py`, `configuration_gemma4.py`.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from brim.readers.blocks import named_mlp
from brim.readers.config_fields import ConfigFields, describe
from brim.readers.decoder_layers import listed_layer_types
from brim.readers.experts import expert_counts, fused_expert
from brim.readers.heads import Head, class_suffix, language_head, read_architecture
from brim.readers.stack import Stack
from brim.spec.model import (
    Attention,
    Embedding,
    LayerGroup,
    Linear,
    Mlp,
    ModelShape,
    Moe,
)

TEXT_DEFAULTS = {
    "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "attention_bias": False, "sliding_window": 512,
    "layer_types": None, "final_logit_softcapping": None, "use_bidirectional_attention": None,
    "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256, "attention_k_eq_v": False,
    "num_kv_shared_layers": 0, "enable_moe_block": False, "use_double_wide_mlp": False, "global_head_dim": 512,
    "num_global_key_value_heads": None, "per_layer_config": None, "num_labels": 2,
}  # fmt: skip
_FULL, _SLIDING = "full_attention", "sliding_attention"
_SLIDING_PERIOD = 6
_LARGEST_NUM_KINDS = 64  # released models have three
_NUM_NORMS, _NUM_EXPERT_NORMS = 4, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What distinguishes one layer from another."""

    is_full: bool
    shares_kv: bool
    head_dim: int
    num_key_value_heads: int


def read_gemma4_text(fields: ConfigFields) -> ModelShape:
    """Return the shape of a text-only Gemma 4.

    Raises:
        InvalidConfig: a key is broken.
        UnsupportedModel: a class or feature is not known.
    """
    fields = replace(fields, defaults=TEXT_DEFAULTS)
    architecture = read_architecture(fields, "Gemma4ForCausalLM")
    stack = read_text_stack(fields)
    head = _head(fields, class_suffix(fields, architecture, ("Gemma4", "Gemma4Text")), stack.hidden_size)
    return ModelShape(
        name=fields.source,
        model_type=fields.model_type,
        architecture=architecture,
        hidden_size=stack.hidden_size,
        vocab_size=head.vocab_size,
        max_position_embeddings=fields.number("max_position_embeddings"),
        tie_word_embeddings=head.tied,
        embeddings=stack.embeddings,
        groups=stack.groups,
        head=head.linears,
        stem=stack.stem,
        final_norm="rmsnorm",
        other_parameters=stack.other_parameters,
        logit_softcap=fields.get("final_logit_softcapping") is not None and head.vocab_size > 0,
        native_dtype=fields.native_dtype(),
    )


def _head(fields: ConfigFields, suffix: str, hidden_size: int) -> Head:
    match suffix:
        case "ForCausalLM":
            return language_head(fields, hidden_size)
        case "Model":
            return Head()
    fields.unsupported(f"class suffix {suffix[:60]}")


def read_text_stack(fields: ConfigFields) -> Stack:
    """Return the layers and embeddings of the text model; every layer has an embedding of its own (`E2B`, `E4B`)."""
    hidden_size, num_layers = fields.number("hidden_size"), fields.num_layers()
    kinds = Counter(_kinds(fields, num_layers))
    if len(kinds) > _LARGEST_NUM_KINDS:
        fields.refuse("per_layer_config", f"describes {len(kinds)} kinds of layers")
    tables = [Embedding(name="embed_tokens", num_embeddings=fields.number("vocab_size"), embedding_dim=hidden_size)]
    stem, other_parameters = (), hidden_size
    per_layer = _per_layer_size(fields)
    if per_layer:
        width = num_layers * per_layer
        rows = fields.number("vocab_size_per_layer_input")
        tables.append(Embedding(name="embed_tokens_per_layer", num_embeddings=rows, embedding_dim=width))
        stem = (Linear(name="per_layer_model_projection", in_features=hidden_size, out_features=width),)
        other_parameters += per_layer
    return Stack(
        hidden_size=hidden_size,
        embeddings=tuple(tables),
        groups=tuple(_group(fields, kind, count, hidden_size, per_layer) for kind, count in kinds.items()),
        other_parameters=other_parameters,
        stem=stem,
    )


def _per_layer_size(fields: ConfigFields) -> int:
    """Return the width of a layer's own input, elements; 0 without."""
    return fields.optional_number("hidden_size_per_layer_input", at_least=0) or 0


def _kinds(fields: ConfigFields, num_layers: int) -> list[_Kind]:
    """Return the kind of every layer; the last always sees everything, whatever `layer_types` says."""
    listed = listed_layer_types(fields, num_layers)
    if listed is None:
        listed = [_SLIDING if (layer + 1) % _SLIDING_PERIOD else _FULL for layer in range(num_layers)]
    types = [*listed[:-1], _FULL]
    first_shared = _first_shared(fields, types)
    overrides = _overrides(fields, types)
    return [
        _Kind(
            is_full=kind == _FULL,
            shares_kv=layer >= first_shared,
            head_dim=overrides[layer].number("head_dim"),
            num_key_value_heads=_num_key_value_heads(overrides[layer]),
        )
        for layer, kind in enumerate(types)
    ]


def _first_shared(fields: ConfigFields, types: Sequence[str]) -> int:
    """Return the first layer that uses the keys and values of an earlier one.

    Raises:
        InvalidConfig: no layer of a kind is left to make them.
    """
    first = len(types) - fields.number("num_kv_shared_layers", at_least=0)
    if first < len(types) and set(types[: max(first, 0)]) != set(types):
        fields.refuse("num_kv_shared_layers", "leaves no layer to make the keys and values that others share")
    return first


def _overrides(fields: ConfigFields, types: Sequence[str]) -> list[ConfigFields]:
    """Return the fields each layer sees: full layers have wider heads, and other key/value heads if they have no
    value matrix; or `per_layer_config`, where the config spells it out (transformers saves it so).
    """
    spelled_out = fields.get("per_layer_config")
    if spelled_out is not None:
        return _spelled_out(fields, spelled_out, len(types))
    changes: dict[str, object] = {"head_dim": fields.number("global_head_dim")}
    if fields.flag("attention_k_eq_v") and fields.get("num_global_key_value_heads") is not None:
        changes["num_key_value_heads"] = fields.number("num_global_key_value_heads")
    full = replace(fields, values=ChainMap(changes, fields.values))
    return [full if kind == _FULL else fields for kind in types]


def _spelled_out(fields: ConfigFields, changes: object, num_layers: int) -> list[ConfigFields]:
    """Return the fields each layer sees by `per_layer_config`: layer number -> keys."""
    if not isinstance(changes, Mapping):
        fields.refuse("per_layer_config", f"must be an object, not {describe(changes)}")
    layers = [changes.get(str(layer)) or {} for layer in range(num_layers)]
    for layer in layers:
        if not isinstance(layer, Mapping):
            fields.refuse("per_layer_config", f"must hold objects, not {describe(layer)}")
        if not set(layer) <= {"head_dim", "num_key_value_heads"}:
            fields.unsupported("per_layer_config of other keys than head_dim and num_key_value_heads")
    return [replace(fields, values=ChainMap(layer, fields.values)) if layer else fields for layer in layers]


def _num_key_value_heads(fields: ConfigFields) -> int:
    """Return key/value heads of a layer."""
    num_heads, num_kv_heads = fields.number("num_attention_heads"), fields.number("num_key_value_heads")
    if num_heads % num_kv_heads:
        fields.refuse("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads {num_heads}")
    return num_kv_heads


def _group(fields: ConfigFields, kind: _Kind, count: int, hidden_size: int, per_layer: int) -> LayerGroup:
    """Return the group of layers of one kind."""
    has_experts = fields.flag("enable_moe_block")
    mlp = _mlp(fields, kind, hidden_size)
    return LayerGroup(
        count=count,
        attention=_attention(fields, kind, hidden_size),
        mlp=_experts(fields, hidden_size, mlp) if has_experts else mlp,
        norm="rmsnorm",
        num_norms=_NUM_NORMS + (_NUM_EXPERT_NORMS if has_experts else 0) + (1 if per_layer else 0),
        hidden_size=hidden_size,
        other_linears=()
        if not per_layer
        else (
            Linear(name="per_layer_input_gate", in_features=hidden_size, out_features=per_layer),
            Linear(name="per_layer_projection", in_features=per_layer, out_features=hidden_size),
        ),
    )


def _attention(fields: ConfigFields, kind: _Kind, hidden_size: int) -> Attention:
    """Return the attention of a layer: all four matrices, or without values (`attention_k_eq_v`), or without both."""
    num_heads = fields.number("num_attention_heads")
    bias = fields.flag("attention_bias")
    query_size, key_size = num_heads * kind.head_dim, kind.num_key_value_heads * kind.head_dim
    inner = {"q_proj": query_size}
    if not kind.shares_kv:
        inner["k_proj"] = key_size
        if not (kind.is_full and fields.flag("attention_k_eq_v")):
            inner["v_proj"] = key_size
    return Attention(
        num_attention_heads=num_heads,
        num_key_value_heads=kind.num_key_value_heads,
        head_dim=kind.head_dim,
        v_head_dim=kind.head_dim,
        linears=(
            *(Linear(name=name, in_features=hidden_size, out_features=size, bias=bias) for name, size in inner.items()),
            Linear(name="o_proj", in_features=query_size, out_features=hidden_size, bias=bias),
        ),
        sliding_window=None if kind.is_full else fields.number("sliding_window"),
        causal=fields.get("use_bidirectional_attention") != "all",
        qk_norm="head",
        shares_kv=kind.shares_kv,
        other_parameters=kind.head_dim * (1 if kind.shares_kv else 2),
    )


def _mlp(fields: ConfigFields, kind: _Kind, hidden_size: int) -> Mlp:
    """Return the dense block, twice as wide where keys and values are shared if the config says so."""
    factor = 2 if kind.shares_kv and fields.flag("use_double_wide_mlp") else 1
    return named_mlp(
        names=("gate_proj", "up_proj", "down_proj"),
        hidden_size=hidden_size,
        intermediate_size=factor * fields.number("intermediate_size"),
        hidden_act=fields.text("hidden_activation"),
        gated=True,
    )


def _experts(fields: ConfigFields, hidden_size: int, dense: Mlp) -> Moe:
    """Return the experts; the dense block runs beside them for every token."""
    num_experts, num_visited = expert_counts(fields, "num_experts", "top_k_experts")
    width = fields.number("moe_intermediate_size")
    return Moe(
        num_experts=num_experts,
        num_experts_per_tok=num_visited,
        intermediate_size=width,
        hidden_act=fields.text("hidden_activation"),
        router=Linear(name="proj", in_features=hidden_size, out_features=num_experts),
        router_is_module=True,
        expert_linears=fused_expert(hidden_size, width, bare=True),
        shared=dense,
        other_parameters=hidden_size + num_experts,
    )

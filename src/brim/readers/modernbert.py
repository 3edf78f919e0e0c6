"""ModernBERT: a pre-norm encoder with gated feed-forward, rotary positions and local layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from brim.readers.blocks import even_head_dim, full_attention, named_mlp
from brim.readers.config_fields import ConfigFields
from brim.readers.decoder_layers import listed_layer_types
from brim.readers.heads import (
    Head,
    class_suffix,
    label_head,
    language_head,
    read_architecture,
)
from brim.spec.model import Attention, Embedding, LayerGroup, Linear, ModelShape

_DEFAULTS = {
    "vocab_size": 50368, "intermediate_size": 1152, "hidden_activation": "gelu", "max_position_embeddings": 8192,
    "norm_bias": False, "attention_bias": False, "mlp_bias": False, "layer_types": None, "local_attention": 128,
    "decoder_bias": True, "classifier_bias": False, "tie_word_embeddings": True, "global_attn_every_n_layers": 3,
    "num_labels": 2,
}  # fmt: skip


def read_modernbert(fields: ConfigFields) -> ModelShape:
    """Return the shape of a ModernBERT under the head its class has; masked language modelling if none.

    Source: transformers `models/modernbert/modeling_modernbert.py`.
    """
    fields = replace(fields, defaults=_DEFAULTS)
    architecture = read_architecture(fields, "ModernBertForMaskedLM")
    hidden_size = fields.number("hidden_size")
    norm_size = hidden_size * (2 if fields.flag("norm_bias") else 1)
    head = _head(fields, class_suffix(fields, architecture, ("ModernBert",)), hidden_size, norm_size)
    return ModelShape(
        name=fields.source,
        model_type=fields.model_type,
        architecture=architecture,
        hidden_size=hidden_size,
        vocab_size=head.vocab_size,
        max_position_embeddings=fields.number("max_position_embeddings"),
        tie_word_embeddings=head.tied,
        embeddings=(
            Embedding(name="tok_embeddings", num_embeddings=fields.number("vocab_size"), embedding_dim=hidden_size),
        ),
        groups=_layers(fields, hidden_size),
        head=head.linears,
        final_norm="layernorm",
        other_parameters=2 * norm_size + head.other_parameters,
        native_dtype=fields.native_dtype(),
    )


def _layers(fields: ConfigFields, hidden_size: int) -> tuple[LayerGroup, ...]:
    """Return global and local layers; the very first has no norm before its attention."""
    num_layers, period = fields.num_layers(), fields.number("global_attn_every_n_layers")
    types = listed_layer_types(fields, num_layers)
    if types is None:
        types = ["sliding_attention" if layer % period else "full_attention" for layer in range(num_layers)]
    kinds = Counter((kind, layer == 0) for layer, kind in enumerate(types))
    return tuple(
        LayerGroup(
            count=count,
            attention=_attention(fields, hidden_size, kind == "sliding_attention"),
            mlp=named_mlp(
                names=("Wi", "Wo"),
                hidden_size=hidden_size,
                intermediate_size=fields.number("intermediate_size"),
                hidden_act=fields.text("hidden_activation"),
                bias=fields.flag("mlp_bias"),
                gated=True,
            ),
            norm="layernorm",
            num_norms=1 if is_first else 2,
            norm_bias=fields.flag("norm_bias"),
            stack="encoder",
            hidden_size=hidden_size,
        )
        for (kind, is_first), count in kinds.items()
    )


def _attention(fields: ConfigFields, hidden_size: int, local: bool) -> Attention:
    """Return the attention of a global or a local layer; a local one sees half the window on each side."""
    num_heads = fields.number("num_attention_heads")
    return full_attention(
        names=("Wqkv", "Wo"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        head_dim=even_head_dim(fields, hidden_size, num_heads),
        bias=fields.flag("attention_bias"),
        rotary=True,
        sliding_window=2 * (fields.number("local_attention", at_least=0) // 2) + 1 if local else None,
    )


def _head(fields: ConfigFields, suffix: str, hidden_size: int, norm_size: int) -> Head:
    """Return the head of a class: a transform and a norm, then the vocabulary or the labels."""
    bias = fields.flag("classifier_bias")
    dense = Linear(name="dense", in_features=hidden_size, out_features=hidden_size, bias=bias)
    match suffix:
        case "ForMaskedLM":
            head = language_head(fields, hidden_size, bias=fields.flag("decoder_bias"), before=(dense,), name="decoder")
        case "ForSequenceClassification" | "ForTokenClassification" | "ForQuestionAnswering":
            head = label_head(fields, hidden_size, "classifier", bias=True, before=(dense,))
        case "Model":
            return Head()
        case _:
            fields.unsupported(f"class suffix {suffix[:60]}")
    return replace(head, other_parameters=norm_size)

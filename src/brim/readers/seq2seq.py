"""T5 and BART: an encoder, and a decoder that also attends to the encoder's output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from brim.readers.blocks import even_head_dim, full_attention, named_mlp
from brim.readers.config_fields import ConfigFields
from brim.readers.heads import (
    Head,
    class_suffix,
    label_head,
    language_head,
    read_architecture,
)
from brim.spec.model import Attention, Embedding, LayerGroup, Linear, Mlp, ModelShape

_T5_ALIASES = {
    "hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}  # fmt: skip
_T5_DEFAULTS = {
    "vocab_size": 32128, "d_kv": 64, "d_ff": 2048, "num_decoder_layers": None, "relative_attention_num_buckets": 32,
    "feed_forward_proj": "relu", "num_labels": 2,
}  # fmt: skip
_MT5_DEFAULTS = _T5_DEFAULTS | {"vocab_size": 250112, "d_ff": 1024, "feed_forward_proj": "gated-gelu"}
_BART_ALIASES = {
    "num_attention_heads": "encoder_attention_heads", "hidden_size": "d_model", "num_hidden_layers": "encoder_layers"
}  # fmt: skip
_BART_DEFAULTS = {
    "vocab_size": 50265, "max_position_embeddings": 1024, "encoder_layers": 12, "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16, "decoder_layers": 12, "decoder_ffn_dim": 4096, "decoder_attention_heads": 16,
    "activation_function": "gelu", "tie_word_embeddings": True, "num_labels": 3,
}  # fmt: skip


def read_t5(fields: ConfigFields) -> ModelShape:
    """Return the shape of a T5, Flan-T5 or mT5.

    transformers 5 ties the output head always, also of v1.1 checkpoints that hold one of their own.

    Source: transformers `models/t5/modeling_t5.py`, `configuration_t5.py`.
    """
    is_mt5 = fields.model_type == "mt5"
    fields = replace(fields, defaults=_MT5_DEFAULTS if is_mt5 else _T5_DEFAULTS, aliases=_T5_ALIASES)
    prefix = "MT5" if is_mt5 else "T5"
    architecture = read_architecture(fields, prefix + "ForConditionalGeneration")
    suffix = class_suffix(fields, architecture, (prefix,))
    d_model, vocab_size = fields.number("d_model"), fields.number("vocab_size")
    has_decoder = suffix not in ("EncoderModel", "ForTokenClassification")
    head = _t5_head(fields, suffix, d_model)
    return ModelShape(
        name=fields.source,
        model_type=fields.model_type,
        architecture=architecture,
        hidden_size=d_model,
        vocab_size=head.vocab_size,
        max_position_embeddings=None,
        tie_word_embeddings=head.tied,
        embeddings=(Embedding(name="shared", num_embeddings=vocab_size, embedding_dim=d_model),),
        groups=_t5_groups(fields, has_decoder),
        head=head.linears,
        final_norm="rmsnorm",
        other_parameters=d_model * (2 if has_decoder else 1),
        native_dtype=fields.native_dtype(),
    )


def _t5_groups(fields: ConfigFields, has_decoder: bool) -> tuple[LayerGroup, ...]:
    """Return both stacks; the first layer of each holds the table of relative positions for all."""
    num_encoder_layers = fields.num_layers("num_layers")
    num_decoder_layers = num_encoder_layers
    if fields.get("num_decoder_layers") is not None:
        num_decoder_layers = fields.num_layers("num_decoder_layers")
    groups = list(_t5_stack(fields, num_encoder_layers, is_decoder=False))
    if has_decoder:
        groups += _t5_stack(fields, num_decoder_layers, is_decoder=True)
    return tuple(groups)


def _t5_stack(fields: ConfigFields, num_layers: int, *, is_decoder: bool) -> Iterable[LayerGroup]:
    """Yield the first layer of a stack, then the others."""
    d_model = fields.number("d_model")
    table = fields.number("relative_attention_num_buckets") * fields.number("num_heads")
    for count, other_parameters in ((1, table), (num_layers - 1, 0)):
        if count > 0:
            yield LayerGroup(
                count=count,
                attention=_t5_attention(fields, causal=is_decoder, other_parameters=other_parameters),
                cross_attention=_t5_attention(fields) if is_decoder else None,
                mlp=_t5_mlp(fields),
                norm="rmsnorm",
                num_norms=3 if is_decoder else 2,
                stack="decoder" if is_decoder else "encoder",
                hidden_size=d_model,
            )


def _t5_attention(fields: ConfigFields, *, causal: bool = False, other_parameters: int = 0) -> Attention:
    return full_attention(
        names=("q", "k", "v", "o"),
        hidden_size=fields.number("d_model"),
        num_heads=fields.number("num_heads"),
        head_dim=fields.number("d_kv"),
        causal=causal,
        other_parameters=other_parameters,
    )


def _t5_mlp(fields: ConfigFields) -> Mlp:
    """Return the feed-forward block `feed_forward_proj` names: `relu` (v1.0) or `gated-gelu` (v1.1)."""
    first, *rest = fields.text("feed_forward_proj").split("-")
    if len(rest) > 1 or (rest and first != "gated"):
        fields.refuse("feed_forward_proj", "must be an activation or gated-<activation>")
    gated = first == "gated"
    activation = rest[0] if rest else first
    return named_mlp(
        names=("wi_0", "wi_1", "wo") if gated else ("wi", "wo"),
        hidden_size=fields.number("d_model"),
        intermediate_size=fields.number("d_ff"),
        hidden_act="gelu_new" if gated and activation == "gelu" else activation,
        gated=gated,
    )


def _t5_head(fields: ConfigFields, suffix: str, d_model: int) -> Head:
    match suffix:
        case "ForConditionalGeneration":
            vocab_size = fields.number("vocab_size")
            linear = Linear(name="lm_head", in_features=d_model, out_features=vocab_size)
            return Head(linears=(linear,), vocab_size=vocab_size, tied=True)
        case "ForSequenceClassification":
            return _pooled_head(fields, d_model)
        case "ForTokenClassification":
            return label_head(fields, d_model, "classifier", bias=True)
        case "ForQuestionAnswering":
            return label_head(fields, d_model, "qa_outputs", bias=True)
        case "Model" | "EncoderModel":
            return Head()
    fields.unsupported(f"class suffix {suffix[:60]}")


def _pooled_head(fields: ConfigFields, d_model: int) -> Head:
    """Return the classification head over the end-of-sequence token."""
    dense = Linear(name="dense", in_features=d_model, out_features=d_model, bias=True)
    return label_head(fields, d_model, "out_proj", bias=True, before=(dense,))


def read_bart(fields: ConfigFields) -> ModelShape:
    """Return the shape of a BART.

    Source: transformers `models/bart/modeling_bart.py`.
    """
    fields = replace(fields, defaults=_BART_DEFAULTS, aliases=_BART_ALIASES)
    architecture = read_architecture(fields, "BartForConditionalGeneration")
    d_model, max_positions = fields.number("d_model"), fields.number("max_position_embeddings")
    head = _bart_head(fields, class_suffix(fields, architecture, ("Bart",)), d_model)
    return ModelShape(
        name=fields.source,
        model_type=fields.model_type,
        architecture=architecture,
        hidden_size=d_model,
        vocab_size=head.vocab_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=head.tied,
        embeddings=_bart_embeddings(fields, d_model, max_positions),
        groups=(_bart_group(fields, "encoder", d_model), _bart_group(fields, "decoder", d_model)),
        head=head.linears,
        final_norm="layernorm",
        other_parameters=4 * d_model,
        native_dtype=fields.native_dtype(),
    )


def _bart_embeddings(fields: ConfigFields, d_model: int, max_positions: int) -> tuple[Embedding, ...]:
    """Return the token table, once per stack more if untied, and a position table per stack (two rows are padding)."""
    vocab_size = fields.number("vocab_size")
    tables = [("shared", vocab_size)]
    if not fields.flag("tie_word_embeddings"):
        tables += [("embed_tokens", vocab_size)] * 2
    tables += [("embed_positions", max_positions + 2)] * 2
    return tuple(Embedding(name=name, num_embeddings=rows, embedding_dim=d_model) for name, rows in tables)


def _bart_group(fields: ConfigFields, stack: str, d_model: int) -> LayerGroup:
    """Return the layers of one stack."""
    is_decoder = stack == "decoder"
    return LayerGroup(
        count=fields.num_layers(f"{stack}_layers"),
        attention=_bart_attention(fields, stack, d_model, causal=is_decoder),
        cross_attention=_bart_attention(fields, stack, d_model) if is_decoder else None,
        mlp=named_mlp(
            names=("fc1", "fc2"),
            hidden_size=d_model,
            intermediate_size=fields.number(f"{stack}_ffn_dim"),
            hidden_act=fields.text("activation_function"),
            bias=True,
        ),
        norm="layernorm",
        num_norms=3 if is_decoder else 2,
        norm_bias=True,
        stack="decoder" if is_decoder else "encoder",
        hidden_size=d_model,
    )


def _bart_attention(fields: ConfigFields, stack: str, d_model: int, *, causal: bool = False) -> Attention:
    key = f"{stack}_attention_heads"
    num_heads = fields.number(key)
    return full_attention(
        names=("q_proj", "k_proj", "v_proj", "out_proj"),
        hidden_size=d_model,
        num_heads=num_heads,
        head_dim=even_head_dim(fields, d_model, num_heads, key=key, width="d_model"),
        bias=True,
        causal=causal,
    )


def _bart_head(fields: ConfigFields, suffix: str, d_model: int) -> Head:
    match suffix:
        case "ForConditionalGeneration":
            return language_head(fields, d_model)
        case "ForSequenceClassification":
            return _pooled_head(fields, d_model)
        case "Model":
            return Head()
    fields.unsupported(f"class suffix {suffix[:60]}")

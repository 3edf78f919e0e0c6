"""BERT, RoBERTa and XLM-RoBERTa: post-norm encoders with learned positions."""

from __future__ import annotations

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
from brim.spec.model import Embedding, LayerGroup, Linear, ModelShape

_PREFIXES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
_DEFAULTS = {
    "vocab_size": 30522, "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512,
    "type_vocab_size": 2, "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True,
    "num_labels": 2,
}  # fmt: skip


def read_bert(fields: ConfigFields) -> ModelShape:
    """Return the shape of a BERT-like encoder under the head its class has; masked language modelling if none.

    Source: transformers `models/bert/modeling_bert.py`, `models/roberta/modeling_roberta.py`.
    """
    vocab_size = 30522 if fields.model_type != "roberta" else 50265
    fields = replace(fields, defaults=_DEFAULTS | {"vocab_size": vocab_size})
    if fields.flag("add_cross_attention"):
        fields.unsupported("add_cross_attention")
    prefix = _PREFIXES[fields.model_type]
    architecture = read_architecture(fields, prefix + "ForMaskedLM")
    hidden_size = fields.number("hidden_size")
    head = _head(fields, class_suffix(fields, architecture, (prefix,)), hidden_size)
    max_positions = fields.number("max_position_embeddings")
    tables = {
        "word_embeddings": fields.number("vocab_size"),
        "position_embeddings": max_positions,
        "token_type_embeddings": fields.number("type_vocab_size"),
    }
    return ModelShape(
        name=fields.source,
        model_type=fields.model_type,
        architecture=architecture,
        hidden_size=hidden_size,
        vocab_size=head.vocab_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=head.tied,
        embeddings=tuple(
            Embedding(name=name, num_embeddings=rows, embedding_dim=hidden_size) for name, rows in tables.items()
        ),
        groups=(_layers(fields, hidden_size),),
        head=head.linears,
        final_norm="layernorm",
        other_parameters=2 * hidden_size + head.other_parameters,
        native_dtype=fields.native_dtype(),
    )


def _layers(fields: ConfigFields, hidden_size: int) -> LayerGroup:
    """Return the encoder's layers."""
    num_heads = fields.number("num_attention_heads")
    return LayerGroup(
        count=fields.num_layers(),
        attention=full_attention(
            names=("query", "key", "value", "dense"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=even_head_dim(fields, hidden_size, num_heads),
            bias=True,
            causal=fields.flag("is_decoder"),
        ),
        mlp=named_mlp(
            names=("dense", "dense"),
            hidden_size=hidden_size,
            intermediate_size=fields.number("intermediate_size"),
            hidden_act=fields.text("hidden_act"),
            bias=True,
        ),
        norm="layernorm",
        num_norms=2,
        norm_bias=True,
        stack="encoder",
        hidden_size=hidden_size,
    )


def _head(fields: ConfigFields, suffix: str, hidden_size: int) -> Head:
    """Return the head of a class; BERT classifies sequences from a pooled token, RoBERTa through its own head."""
    dense = Linear(name="dense", in_features=hidden_size, out_features=hidden_size, bias=True)
    pools = fields.model_type == "bert"
    match suffix:
        case "ForMaskedLM" | "LMHeadModel" | "ForCausalLM" if suffix != ("ForCausalLM" if pools else "LMHeadModel"):
            return _masked_head(fields, dense)
        case "ForPreTraining" if pools:
            sentence_pair = Linear(name="seq_relationship", in_features=hidden_size, out_features=2, bias=True)
            head = _masked_head(fields, dense)
            return replace(head, linears=(dense, sentence_pair, *head.linears))
        case "ForSequenceClassification":
            return label_head(fields, hidden_size, "classifier" if pools else "out_proj", bias=True, before=(dense,))
        case "ForTokenClassification":
            return label_head(fields, hidden_size, "classifier", bias=True)
        case "ForQuestionAnswering":
            return label_head(fields, hidden_size, "qa_outputs", bias=True)
        case "Model":
            return Head(linears=(dense,))
    fields.unsupported(f"class suffix {suffix[:60]}")


def _masked_head(fields: ConfigFields, dense: Linear) -> Head:
    """Return the head of masked language modelling: a transform, a norm and the vocabulary.

    Its bias is a parameter of its own, tied to the decoder's bias along with the weights.
    """
    head = language_head(fields, dense.out_features, bias=True, before=(dense,), name="decoder")
    separate_bias = 0 if head.tied else head.vocab_size
    return replace(head, other_parameters=2 * dense.out_features + separate_bias)

"""Gemma 3 with its SigLIP vision tower."""

from __future__ import annotations

from dataclasses import replace

from brim.readers.config_fields import ConfigFields
from brim.readers.decoder_table import DECODERS
from brim.readers.decoders import read_stack
from brim.readers.heads import (
    Head,
    class_suffix,
    label_head,
    language_head,
    read_architecture,
)
from brim.readers.vit import num_patches, patch_embedding, vision_layers
from brim.spec.model import Embedding, Linear, ModelShape

_DEFAULTS = {"tie_word_embeddings": True, "num_labels": 2}
_SIGLIP_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": True,
}  # fmt: skip


def read_gemma3(fields: ConfigFields) -> ModelShape:
    """Return the shape of a multimodal Gemma 3: the text model, the vision tower, the projector between them.

    Source: transformers `models/gemma3/modeling_gemma3.py`, `models/siglip/modeling_siglip.py`.
    """
    fields = replace(fields, defaults=_DEFAULTS)
    architecture = read_architecture(fields, "Gemma3ForConditionalGeneration")
    facts = DECODERS["gemma3_text"]
    text = fields.child("text_config", model_type="gemma3_text", defaults=facts.defaults)
    vision = fields.child("vision_config", model_type="siglip_vision_model", defaults=_SIGLIP_DEFAULTS)
    if vision.flag("vision_use_head"):
        fields.unsupported("vision_use_head=true")
    stack, vision_width, patches = read_stack(text, facts), vision.number("hidden_size"), num_patches(vision)
    head = _head(fields, text, class_suffix(fields, architecture, ("Gemma3",)), stack.hidden_size)
    projector = Linear(
        name="mm_input_projection_weight", in_features=vision_width, out_features=stack.hidden_size, bare=True
    )
    position_table = Embedding(name="position_embedding", num_embeddings=patches, embedding_dim=vision_width)
    return ModelShape(
        name=fields.source,
        model_type=fields.model_type,
        architecture=architecture,
        hidden_size=stack.hidden_size,
        vocab_size=head.vocab_size,
        max_position_embeddings=text.number("max_position_embeddings"),
        tie_word_embeddings=head.tied,
        embeddings=(*stack.embeddings, position_table),
        groups=(
            vision_layers(vision, ("q_proj", "k_proj", "v_proj", "out_proj"), query_bias=True),
            *stack.groups,
        ),
        head=head.linears,
        stem=(patch_embedding(vision, "patch_embedding"), projector),
        final_norm=facts.norm,
        other_parameters=stack.other_parameters + 2 * vision_width + vision_width,
        logit_softcap=text.get("final_logit_softcapping") is not None and head.vocab_size > 0,
        native_dtype=fields.native_dtype(text),
    )


def _head(fields: ConfigFields, text: ConfigFields, suffix: str, hidden_size: int) -> Head:
    match suffix:
        case "ForConditionalGeneration":
            return language_head(text, hidden_size, tied=fields.flag("tie_word_embeddings"))
        case "ForSequenceClassification":
            return label_head(fields, hidden_size, "score", bias=False)
        case "Model":
            return Head()
    fields.unsupported(f"class suffix {suffix[:60]}")

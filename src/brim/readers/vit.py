"""Vision transformers: ViT, and the SigLIP tower inside Gemma 3."""

from __future__ import annotations

from dataclasses import replace

from brim.readers.blocks import even_head_dim, full_attention, named_mlp
from brim.readers.config_fields import ConfigFields
from brim.readers.heads import Head, class_suffix, label_head, read_architecture
from brim.spec.model import LayerGroup, Linear, ModelShape

_DEFAULTS = {
    "intermediate_size": 3072, "hidden_act": "gelu", "image_size": 224, "patch_size": 16, "num_channels": 3,
    "qkv_bias": True, "pooler_output_size": None, "num_labels": 2, "head_dim": None,
}  # fmt: skip
_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def read_vit(fields: ConfigFields) -> ModelShape:
    """Return the shape of a ViT under the head its class has; image classification if none.

    It has no lookup tables: the patch embedding, a convolution, is in `stem`, positions and class token in
    `other_parameters`.

    Source: transformers `models/vit/modeling_vit.py`.
    """
    fields = replace(fields, defaults=_DEFAULTS)
    head_dim = fields.optional_number("head_dim")
    architecture = read_architecture(fields, "ViTForImageClassification")
    hidden_size = fields.number("hidden_size")
    head = _head(fields, class_suffix(fields, architecture, ("ViT",)), hidden_size)
    num_tokens = num_patches(fields) + 1
    return ModelShape(
        name=fields.source,
        model_type=fields.model_type,
        architecture=architecture,
        hidden_size=hidden_size,
        vocab_size=0,
        max_position_embeddings=num_tokens,
        tie_word_embeddings=False,
        embeddings=(),
        groups=(vision_layers(fields, _NAMES, query_bias=fields.flag("qkv_bias"), head_dim=head_dim),),
        head=head.linears,
        stem=(patch_embedding(fields, "projection"),),
        final_norm="layernorm",
        other_parameters=(num_tokens + 1 + 2) * hidden_size,
        native_dtype=fields.native_dtype(),
        sequence_tokens=num_tokens,
    )


def num_patches(fields: ConfigFields) -> int:
    """Return patches of an image.

    Raises:
        InvalidConfig: a patch is larger than the image.
    """
    image, patch = fields.pair("image_size"), fields.pair("patch_size")
    patches = (image[0] // patch[0]) * (image[1] // patch[1])
    if patches == 0:
        fields.refuse("patch_size", f"{patch} is larger than image_size {image}")
    return patches


def patch_embedding(fields: ConfigFields, name: str) -> Linear:
    """Return the convolution that embeds patches, as a matrix."""
    height, width = fields.pair("patch_size")
    return Linear(
        name=name,
        in_features=fields.number("num_channels") * height * width,
        out_features=fields.number("hidden_size"),
        bias=True,
        bare=True,
    )


def vision_layers(
    fields: ConfigFields, names: tuple[str, ...], *, query_bias: bool, head_dim: int | None = None
) -> LayerGroup:
    """Return the pre-norm layers of a vision tower; `head_dim` None means that heads tile the hidden width."""
    hidden_size, num_heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    return LayerGroup(
        count=fields.num_layers(),
        attention=full_attention(
            names=names,
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=head_dim or even_head_dim(fields, hidden_size, num_heads),
            bias=query_bias,
            output_bias=True,
        ),
        mlp=named_mlp(
            names=("fc1", "fc2"),
            hidden_size=hidden_size,
            intermediate_size=fields.number("intermediate_size"),
            hidden_act=fields.text("hidden_act"),
            bias=True,
        ),
        norm="layernorm",
        num_norms=2,
        norm_bias=True,
        stack="vision",
        hidden_size=hidden_size,
    )


def _head(fields: ConfigFields, suffix: str, hidden_size: int) -> Head:
    match suffix:
        case "ForImageClassification":
            return label_head(fields, hidden_size, "classifier", bias=True)
        case "Model":
            width = fields.optional_number("pooler_output_size", at_least=0) or hidden_size
            return Head(linears=(Linear(name="dense", in_features=hidden_size, out_features=width, bias=True),))
    fields.unsupported(f"class suffix {suffix[:60]}")

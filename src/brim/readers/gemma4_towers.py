"""Gemma 4 with its vision and audio towers.

Source: transformers 5.23 `models/gemma4/modeling_gemma4.py`, `configuration_gemma4.py`.
"""

from __future__ import annotations

from dataclasses import replace

from brim.readers.blocks import even_head_dim, full_attention, named_mlp
from brim.readers.config_fields import ConfigFields
from brim.readers.gemma4 import TEXT_DEFAULTS, read_text_stack
from brim.readers.heads import Head, class_suffix, language_head, read_architecture
from brim.readers.stack import Stack
from brim.spec.model import Attention, LayerGroup, Linear, ModelShape

_DEFAULTS = {"tie_word_embeddings": True, "num_labels": 2}
_VISION_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12,
    "num_key_value_heads": 12, "head_dim": 64, "hidden_activation": "gelu_pytorch_tanh", "patch_size": 16,
    "position_embedding_size": 10240,
}  # fmt: skip
_AUDIO_DEFAULTS = {
    "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8, "hidden_act": "silu",
    "subsampling_conv_channels": (128, 32), "conv_kernel_size": 5, "output_proj_dims": 1536,
}  # fmt: skip
_NUM_COLOURS, _SUBSAMPLE_KERNEL = 3, 9
# Both towers wrap every matrix in a module that clips; the matrix itself is called `linear`.
_CLIPPED = "linear"


def read_gemma4(fields: ConfigFields) -> ModelShape:
    """Return the shape of a multimodal Gemma 4: the text model, and the towers its config has.

    Raises:
        InvalidConfig: a key is broken.
        UnsupportedModel: a class or feature is not known.
    """
    fields = replace(fields, defaults=_DEFAULTS)
    architecture = read_architecture(fields, "Gemma4ForConditionalGeneration")
    text = fields.child("text_config", model_type="gemma4_text", defaults=TEXT_DEFAULTS)
    stack = read_text_stack(text)
    towers = [read(fields, stack.hidden_size) for key, read in _TOWERS.items() if fields.has(key)]
    head = _head(fields, text, class_suffix(fields, architecture, ("Gemma4",)), stack.hidden_size)
    return ModelShape(
        name=fields.source,
        model_type=fields.model_type,
        architecture=architecture,
        hidden_size=stack.hidden_size,
        vocab_size=head.vocab_size,
        max_position_embeddings=text.number("max_position_embeddings"),
        tie_word_embeddings=head.tied,
        embeddings=stack.embeddings,
        groups=(*(group for tower in towers for group in tower.groups), *stack.groups),
        head=head.linears,
        stem=(*(linear for tower in towers for linear in tower.stem), *stack.stem),
        final_norm="rmsnorm",
        other_parameters=stack.other_parameters + sum(tower.other_parameters for tower in towers),
        logit_softcap=text.get("final_logit_softcapping") is not None and head.vocab_size > 0,
        native_dtype=fields.native_dtype(text),
    )


def _head(fields: ConfigFields, text: ConfigFields, suffix: str, hidden_size: int) -> Head:
    match suffix:
        case "ForConditionalGeneration":
            return language_head(text, hidden_size, tied=fields.flag("tie_word_embeddings"))
        case "Model":
            return Head()
    fields.unsupported(f"class suffix {suffix[:60]}")


def _vision_tower(fields: ConfigFields, text_width: int) -> Stack:
    """Return the vision tower: patches in, positions from a table per image side."""
    fields = fields.child("vision_config", model_type="gemma4_vision", defaults=_VISION_DEFAULTS)
    hidden_size, patch = fields.number("hidden_size"), fields.number("patch_size")
    return Stack(
        hidden_size=hidden_size,
        embeddings=(),
        groups=(
            LayerGroup(
                count=fields.num_layers(),
                attention=_vision_attention(fields, hidden_size),
                mlp=named_mlp(
                    names=(_CLIPPED, _CLIPPED, _CLIPPED),
                    hidden_size=hidden_size,
                    intermediate_size=fields.number("intermediate_size"),
                    hidden_act=fields.text("hidden_activation"),
                    gated=True,
                ),
                norm="rmsnorm",
                num_norms=4,
                stack="vision",
                hidden_size=hidden_size,
            ),
        ),
        other_parameters=2 * fields.number("position_embedding_size") * hidden_size,
        stem=(
            Linear(name="input_proj", in_features=_NUM_COLOURS * patch**2, out_features=hidden_size),
            Linear(name="embedding_projection", in_features=hidden_size, out_features=text_width),
        ),
    )


def _vision_attention(fields: ConfigFields, hidden_size: int) -> Attention:
    num_heads, num_kv_heads = fields.number("num_attention_heads"), fields.number("num_key_value_heads")
    head_dim = fields.number("head_dim")
    if num_heads % num_kv_heads:
        fields.refuse("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads {num_heads}")
    widths = (num_heads, num_kv_heads, num_kv_heads)
    return Attention(
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        linears=(
            *(Linear(name=_CLIPPED, in_features=hidden_size, out_features=heads * head_dim) for heads in widths),
            Linear(name=_CLIPPED, in_features=num_heads * head_dim, out_features=hidden_size),
        ),
        causal=False,
        qk_norm="head",
        other_parameters=2 * head_dim,
    )


def _audio_tower(fields: ConfigFields, text_width: int) -> Stack:
    """Return the audio tower: two strided convolutions, then conformer layers."""
    fields = fields.child("audio_config", model_type="gemma4_audio", defaults=_AUDIO_DEFAULTS)
    hidden_size, out_width = fields.number("hidden_size"), fields.number("output_proj_dims")
    first, second = fields.pair("subsampling_conv_channels")
    convolutions = _SUBSAMPLE_KERNEL * (first + first * second)
    return Stack(
        hidden_size=hidden_size,
        embeddings=(),
        groups=(_conformer(fields, hidden_size),),
        other_parameters=convolutions + first + second,
        stem=(
            Linear(name="input_proj_linear", in_features=first // 4 * second, out_features=hidden_size),
            Linear(name="output_proj", in_features=hidden_size, out_features=out_width, bias=True),
            Linear(name="embedding_projection", in_features=out_width, out_features=text_width),
        ),
    )


def _conformer(fields: ConfigFields, hidden_size: int) -> LayerGroup:
    """Return the audio layers: half a feed-forward before attention, a convolution and another half after it.

    The second half and the convolution's matrices are in `other_linears`. Norms: two per half, three around
    attention and at the end, two around the convolution.
    """
    num_heads = fields.number("num_attention_heads")
    head_dim = even_head_dim(fields, hidden_size, num_heads)
    half = named_mlp(
        names=(_CLIPPED, _CLIPPED),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        hidden_act=fields.text("hidden_act"),
    )
    return LayerGroup(
        count=fields.num_layers(),
        attention=full_attention(
            names=(_CLIPPED,) * 4,
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            other_parameters=head_dim,
        ),
        mlp=half,
        norm="rmsnorm",
        num_norms=9,
        stack="audio",
        hidden_size=hidden_size,
        other_linears=(
            *half.linears,
            Linear(name="relative_k_proj", in_features=hidden_size, out_features=hidden_size),
            Linear(name=_CLIPPED, in_features=hidden_size, out_features=2 * hidden_size),
            Linear(name=_CLIPPED, in_features=hidden_size, out_features=hidden_size),
        ),
        other_parameters=hidden_size * fields.number("conv_kernel_size"),
    )


_TOWERS = {"vision_config": _vision_tower, "audio_config": _audio_tower}

"""Architectures that the formula does not know, as far as the trace needs them: a name, a class, no layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brim.errors import MissingExtra, UnknownName, UnsupportedModel
from brim.readers.hf_config import read_config
from brim.spec.model import ModelShape

_HEADS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "IMAGE_CLASSIFICATION",
          "SPEECH_SEQ_2_SEQ", "AUDIO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "PRETRAINING")  # fmt: skip
"""Heads in the order in which a model that names no class is trained."""


def read_any_config(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """Return the shape of a config; of an architecture that the formula does not know one without layers.

    Raises:
        InvalidConfig: the config is broken. MissingExtra: transformers is not installed.
        UnknownName: transformers does not know the architecture either.
    """
    try:
        return read_config(config, name=name)
    except UnsupportedModel:
        return _read_untabled(config, name)


def _read_untabled(config: Mapping[str, Any], name: str) -> ModelShape:
    text = config.get("text_config")
    words = {**config, **text} if isinstance(text, Mapping) else config
    return ModelShape(
        name=name, model_type=str(config["model_type"]), architecture=_architecture(config, name),
        hidden_size=_number(words, "hidden_size") or _number(words, "d_model") or 0,
        vocab_size=_number(words, "vocab_size") or 0, max_position_embeddings=_number(words, "max_position_embeddings"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)), embeddings=(), groups=(), head=(),
        final_norm="layernorm",
    )  # fmt: skip


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _architecture(config: Mapping[str, Any], name: str) -> str:
    """Return the class a config names, else the natural one to train."""
    stated = config.get("architectures")
    if isinstance(stated, (list, tuple)) and stated and isinstance(stated[0], str):
        return stated[0]
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        raise MissingExtra(package="transformers", extra="trace", purpose="--by trace") from None
    for head in _HEADS:
        found = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES", {}).get(config["model_type"])
        if found:
            return found if isinstance(found, str) else found[0]
    raise UnknownName(
        kind="architecture", name=str(config["model_type"]), known=modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        hint=f"the config of {name} names no class under `architectures`",
    )  # fmt: skip

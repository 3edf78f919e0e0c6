"""`config.json` of a Hugging Face model -> `ModelShape`, with transformers' own parameter counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from brim.cost.parameters import count_parameters
from brim.errors import InvalidConfig, UnsupportedModel
from brim.readers.bert import read_bert
from brim.readers.config_fields import ConfigFields, describe
from brim.readers.decoder_table import DECODERS
from brim.readers.decoders import read_decoder
from brim.readers.dropout import read_dropout
from brim.readers.gemma3 import read_gemma3
from brim.readers.gemma4 import read_gemma4_text
from brim.readers.gemma4_towers import read_gemma4
from brim.readers.modernbert import read_modernbert
from brim.readers.seq2seq import read_bart, read_t5
from brim.readers.vit import read_vit
from brim.spec.model import ModelShape

_LARGEST_NUM_PARAMETERS = 2**50  # a thousand times the largest open model
_READERS: dict[str, Callable[[ConfigFields], ModelShape]] = dict.fromkeys(DECODERS, read_decoder) | {
    "bert": read_bert,
    "roberta": read_bert,
    "xlm-roberta": read_bert,
    "modernbert": read_modernbert,
    "t5": read_t5,
    "mt5": read_t5,
    "bart": read_bart,
    "vit": read_vit,
    "gemma3": read_gemma3,
    "gemma4": read_gemma4,
    "gemma4_text": read_gemma4_text,
}


def read_config(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """Return the shape of the model a `config.json` describes; parameters equal transformers' to the last one.

    The class counted is `architectures[0]`, else the natural one to train. Keys a config leaves out take
    transformers' defaults for its `model_type`. A `quantization_config` changes no shape; `readers.quantization`
    reads it. Remote code (`auto_map`) is ignored if transformers knows the `model_type` itself.

    Args:
        config: the parsed JSON object.
        name: hub id, folder or size the user gave; becomes `ModelShape.name`.

    Raises:
        InvalidConfig: the config is broken: a wrong type, an absurd or contradicting number.
        UnsupportedModel: an architecture, class or feature that the formula does not know.

    Source: transformers 5.23 `models/*/modeling_*.py`.
    """
    model_type = _model_type(config, name)
    reader = _READERS.get(model_type)
    if reader is None:
        raise UnsupportedModel(model=name, what=f"model_type {model_type[:60]}")
    fields = ConfigFields(source=name, model_type=model_type, values=config)
    shape = replace(reader(fields), dropout=read_dropout(fields))
    if count_parameters(shape) > _LARGEST_NUM_PARAMETERS:
        raise InvalidConfig(source=name, path="config", problem="describes more than 2**50 parameters")
    return shape


def _model_type(config: Mapping[str, Any], name: str) -> str:
    """Return `model_type`."""
    if not isinstance(config, Mapping):
        raise InvalidConfig(source=name, path="config", problem=f"must be an object, not {describe(config)}")
    return ConfigFields(source=name, model_type="", values=config).text("model_type")

"""Dropout from configs: every architecture's own keys, and transformers' defaults where a config is silent."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from brim.errors import InvalidConfig
from brim.readers.config_fields import ConfigFields
from brim.readers.dropout import _PLACES, read_dropout
from brim.readers.hf_config import read_config
from brim.spec.model import Dropout
from brim.tables.read import find_card


def read(model_type: str, **values: Any) -> Dropout:
    return read_dropout(ConfigFields(source="test", model_type=model_type, values=values))


@pytest.mark.parametrize(
    ("model_type", "values", "expected"),
    [
        ("gpt2", {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0}, (0.3, 0.2, 0, 0)),
        ("bert", {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.0}, (0, 0.2, 0.2, 0)),
        ("t5", {"dropout_rate": 0.05}, (0.05, 0.05, 0.05, 0.05)),
        ("bart", {"dropout": 0.2, "activation_dropout": 0.3}, (0, 0.2, 0.2, 0.3)),
        ("modernbert", {"mlp_dropout": 0.1}, (0, 0, 0, 0.1)),
        ("opt", {}, (0, 0.1, 0, 0)),
        ("llama", {"attention_dropout": 0.1, "hidden_dropout": 0.5}, (0.1, 0, 0, 0)),
        ("falcon", {"hidden_dropout": None}, (0, 0, 0, 0)),
        ("phi", {"resid_pdrop": 1}, (0, 1, 0, 0)),
    ],
)
def test_keys_are_read_by_the_place_they_act_on(
    model_type: str, values: dict[str, Any], expected: tuple[float, ...]
) -> None:
    """Attention, hidden, embedding, activation."""
    assert tuple(asdict(read(model_type, **values)).values()) == expected


@pytest.mark.parametrize("value", [1.5, -0.1, "0.1", True, [0.1], float("nan"), 10**400])
def test_a_fraction_is_a_number_from_0_to_1(value: object) -> None:
    with pytest.raises(InvalidConfig, match="resid_pdrop must be a number from 0 to 1"):
        read("gpt2", resid_pdrop=value)


def test_a_card_carries_the_dropout_of_its_architecture() -> None:
    card = find_card("gpt2")
    assert card is not None
    shape = read_config(card.config, name=card.id)
    assert shape.dropout == Dropout(attention_dropout=0.1, hidden_dropout=0.1, embedding_dropout=0.1)


def test_defaults_are_those_of_transformers() -> None:
    """A config without the keys trains as transformers' own class would."""
    transformers = pytest.importorskip("transformers")
    for model_type, places in _PLACES.items():
        config = transformers.AutoConfig.for_model(model_type)
        for key in places.values():
            assert getattr(config, key.name) == key.default, (model_type, key)

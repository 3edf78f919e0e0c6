"""Small copies of classes whose configs count layers, heads or words in their own way."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import transformers

from brim.checks.small import shrink_config
from brim.checks.subjects import build_model
from brim.tables.read import find_card


def test_heads_of_a_widened_layer_divide_it() -> None:
    model = build_model(transformers.Mamba2Config().to_dict(), "Mamba2ForCausalLM")
    assert model.config.num_heads * model.config.head_dim == model.config.hidden_size * model.config.expand


@pytest.mark.skipif(not hasattr(transformers, "Gemma4Config"), reason="transformers without Gemma 4")
def test_words_per_layer_are_few_too() -> None:
    card = find_card("google/gemma-4-E2B")
    assert card is not None
    model = build_model(dict(card.config), "Gemma4ForConditionalGeneration")
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000


def test_an_encoder_decoder_without_head_gets_the_one_of_pairs() -> None:
    config = {**transformers.BartConfig().to_dict(), "model_type": "bart"}
    assert type(build_model(config, "BartModel")).__name__ == "BartForConditionalGeneration"


def test_positions_stay_stretched_by_the_same_factor() -> None:
    rope = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}
    small = shrink_config({"max_position_embeddings": 131072, "rope_parameters": rope})
    assert small["max_position_embeddings"] == 512
    assert small["rope_parameters"] == {**rope, "original_max_position_embeddings": 16}

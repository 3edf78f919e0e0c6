"""A checkpoint without a head is trained with the one that is natural to its layers, and brim says so."""

from __future__ import annotations

import pytest

from brim import api
from brim.readers.headless import give_head
from brim.readers.hf_config import read_config

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100,
    "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "image_size": 32, "patch_size": 16,
}  # fmt: skip
T5 = {"model_type": "t5", "d_model": 256, "d_kv": 32, "d_ff": 640, "num_heads": 8, "num_layers": 2, "vocab_size": 1000}


def head_of(config: dict[str, object]) -> tuple[str, tuple[str, ...]]:
    shape, said = give_head(read_config(config, name="tiny"), config)
    return shape.architecture, said


@pytest.mark.parametrize(("model_type", "headless", "trained"), [
    ("bart", "BartModel", "BartForConditionalGeneration"), ("bert", "BertModel", "BertForMaskedLM"),
    ("llama", "LlamaModel", "LlamaForCausalLM"), ("vit", "ViTModel", "ViTForImageClassification"),
])  # fmt: skip
def test_a_head_is_added(model_type: str, headless: str, trained: str) -> None:
    said = f"{headless} has no loss; {trained} is trained"
    assert head_of(SIZES | {"model_type": model_type, "architectures": [headless]}) == (trained, (said,))


def test_a_model_with_a_head_stays() -> None:
    named = "BertLMHeadModel"
    assert head_of(SIZES | {"model_type": "bert", "architectures": [named]}) == (named, ())


@pytest.mark.parametrize("named", ["T5EncoderModel", "T5ForTokenClassification", "T5ForConditionalGeneration"])
def test_other_layers_or_a_head_of_its_own_stay(named: str) -> None:
    assert head_of(T5 | {"architectures": [named]}) == (named, ())


def test_a_plan_says_which_class_is_trained() -> None:
    said = api.plan("facebook/bart-base", gpu="a100-80gb").assumptions
    assert "BartModel has no loss; BartForConditionalGeneration is trained" in said

"""Inputs that brim makes up are taken by the real models, run for real on the CPU."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch
import transformers

from architectures import Case, plan_case, trace_case
from brim.errors import ProbeFailed
from brim.probes.inputs import plan_inputs
from brim.spec.data import DataProfile

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
    "spatial_merge_size": 2,
}  # fmt: skip
CLIP = {**SMALL, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "projection_dim": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", SMALL),
    "LlamaForSequenceClassification": ("llama", SMALL),
    "BertForMaskedLM": ("bert", SMALL),
    "BertForTokenClassification": ("bert", SMALL),
    "BertForQuestionAnswering": ("bert", SMALL),
    "BertForMultipleChoice": ("bert", SMALL),
    "BertForNextSentencePrediction": ("bert", SMALL),
    "BartForConditionalGeneration": ("bart", BART),
    "BartForSequenceClassification": ("bart", BART),
    "ViTForImageClassification": ("vit", {**SMALL, "image_size": 32, "patch_size": 8}),
    "SegformerForSemanticSegmentation": ("segformer", {
        "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "decoder_hidden_size": 8, "image_size": 64,
        "num_attention_heads": [1, 1, 1, 1],
    }),
    "Qwen2VLForConditionalGeneration": ("qwen2_vl", {
        "text_config": {**SMALL, "model_type": "qwen2_vl_text", "num_key_value_heads": 4, "rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4,
        }},
        "vision_config": {"model_type": "qwen2_vl_vision", **QWEN_VISION},
        "image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103,
    }),
    "LlavaForConditionalGeneration": ("llava", {
        "text_config": {**SMALL, "model_type": "llama"}, "vision_config": CLIP, "image_token_index": 100,
        "vision_feature_layer": -1,
    }),
    "FuyuForCausalLM": ("fuyu", {
        **SMALL, "image_size": 32, "patch_size": 8, "num_channels": 3, "num_key_value_heads": 4, "image_token_id": 100,
        "text_config": {**SMALL, "model_type": "persimmon"},
    }),
    "Pix2StructForConditionalGeneration": ("pix2struct", {
        "text_config": {
            "hidden_size": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 128,
            "decoder_start_token_id": 0, "pad_token_id": 0,
        },
        "vision_config": {
            "hidden_size": 32, "patch_embed_hidden_size": 48, "d_kv": 8, "d_ff": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "seq_len": 64,
        },
        "decoder_start_token_id": 0, "pad_token_id": 0,
    }),
    "WhisperForConditionalGeneration": ("whisper", {
        **BART, "max_source_positions": 50, "max_target_positions": 600, "num_mel_bins": 8,
        "decoder_start_token_id": 1,
    }),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def build(name: str) -> Any:
    model_type, numbers = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(transformers.AutoConfig.for_model(model_type, **numbers))


@pytest.mark.parametrize("name", MODELS)
def test_the_real_model_takes_what_is_made_up_for_it(name: str) -> None:
    model = build(name)
    workload, strategy = plan_case(Case("", "", name), length=320)
    inputs = plan_inputs(workload, strategy, model)()
    loss = model(**inputs).loss
    assert loss.requires_grad and torch.isfinite(loss)
    if "input_ids" in inputs:
        assert inputs["input_ids"].shape[0] == 2 and inputs["input_ids"].shape[-1] == 320


def test_an_image_stands_for_as_many_tokens_as_the_model_makes_of_it() -> None:
    model = build("LlavaForConditionalGeneration")
    workload, strategy = plan_case(Case("", "", "Llava"), length=64)
    inputs = plan_inputs(workload, strategy, model)()
    assert (inputs["input_ids"] == 100).sum(-1).tolist() == [16, 16]
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    short, strategy = plan_case(Case("", "", "Llava"), length=16)
    with pytest.raises(ProbeFailed, match="takes 16 tokens, and a sequence has 16; raise the sequence length"):
        plan_inputs(short, strategy, model)


def test_a_mask_is_given_where_sequences_differ_in_length() -> None:
    model = build("BertForMaskedLM")
    workload, strategy = plan_case(Case("", "", "Bert"), length=32)
    assert "attention_mask" not in plan_inputs(workload, strategy, model)()
    padded = replace(workload, data=DataProfile(seq_len=32, packing=False))
    assert plan_inputs(padded, strategy, model)()["attention_mask"].shape == (2, 32)


def test_losses_that_run_on_the_host_are_refused_with_what_to_pass() -> None:
    class OddForUniversalSegmentation(torch.nn.Module):
        config = transformers.AutoConfig.for_model("vit", **SMALL)

    workload, strategy = plan_case(Case("", "", "Odd"))
    with pytest.raises(ProbeFailed, match="scipy on the host; pass make_inputs"):
        plan_inputs(workload, strategy, OddForUniversalSegmentation())


DIVERSE = """
llama LlamaForCausalLM, gemma2 Gemma2ForCausalLM, mixtral MixtralForCausalLM, deepseek_v3 DeepseekV3ForCausalLM,
gpt_oss GptOssForCausalLM, qwen3_next Qwen3NextForCausalLM, mamba MambaForCausalLM, mamba2 Mamba2ForCausalLM,
jamba JambaForCausalLM, bamba BambaForCausalLM, zamba2 Zamba2ForCausalLM, falcon_h1 FalconH1ForCausalLM,
rwkv RwkvForCausalLM, granitemoe GraniteMoeForCausalLM, cohere2 Cohere2ForCausalLM, bert BertForMaskedLM,
deberta-v2 DebertaV2ForSequenceClassification, modernbert ModernBertForTokenClassification,
longformer LongformerForMaskedLM, electra ElectraForQuestionAnswering, xlnet XLNetForSequenceClassification,
t5 T5ForConditionalGeneration, bart BartForConditionalGeneration, bart BartForSequenceClassification,
switch_transformers SwitchTransformersForConditionalGeneration, whisper WhisperForConditionalGeneration,
vit ViTForImageClassification, swin SwinForImageClassification, resnet ResNetForImageClassification,
segformer SegformerForSemanticSegmentation, qwen2_vl Qwen2VLForConditionalGeneration,
llava LlavaForConditionalGeneration, paligemma PaliGemmaForConditionalGeneration, wav2vec2 Wav2Vec2ForCTC,
audio-spectrogram-transformer ASTForAudioClassification, hubert HubertForCTC
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [one.strip() for one in DIVERSE.replace("\n", " ").split(",")])
def test_diverse_architectures_trace(words: str) -> None:
    model_type, name = words.split()
    assert trace_case(Case("", model_type, name)) > 0


@pytest.mark.parametrize("words", ["jamba JambaForCausalLM", "bart BartForSequenceClassification"])
def test_two_of_them_trace(words: str) -> None:
    model_type, name = words.split()
    assert trace_case(Case("", model_type, name)) > 0

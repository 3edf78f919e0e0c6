"""The classes of the exactness table: heads of transformers, each with what its default config lacks."""

from __future__ import annotations

from typing import Any, NamedTuple

ROUTED: dict[str, Any] = {"output_router_logits": True}
"""Router losses on: they are part of what is trained, and the likeliest to be wrong."""
_ROTARY: dict[str, Any] = {"text_config": {"rope_parameters": {
    "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
}}}  # fmt: skip
_PART_ROTARY: dict[str, Any] = {"text_config": {"rope_parameters": {
    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12], "partial_rotary_factor": 1.0,
}}}  # fmt: skip
LOOPS = ("hf", "sft", "accelerate", "lightning")


class Case(NamedTuple):
    """A class that is measured."""

    group: str
    architecture: str
    loops: tuple[str, ...]
    numbers: dict[str, Any] | None = None
    """What its config says otherwise than the default does."""
    labels: str = ""
    """What the name tells apart, such as `regression` for one label."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.architecture} ({self.labels})" if self.labels else self.architecture


_SPOKEN = ("hf", "sft", "accelerate", "lightning")
_OTHER = ("hf", "accelerate", "lightning")

_DENSE = """
LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM GemmaForCausalLM Gemma2ForCausalLM
Gemma3ForCausalLM PhiForCausalLM Phi3ForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM GPTJForCausalLM OPTForCausalLM
BloomForCausalLM FalconForCausalLM MptForCausalLM StableLmForCausalLM Olmo2ForCausalLM GraniteForCausalLM
SmolLM3ForCausalLM CodeGenForCausalLM CohereForCausalLM GlmForCausalLM Glm4ForCausalLM Starcoder2ForCausalLM
GPTBigCodeForCausalLM GPTNeoForCausalLM Cohere2ForCausalLM Olmo3ForCausalLM NemotronForCausalLM Exaone4ForCausalLM
BertLMHeadModel OpenAIGPTLMHeadModel CTRLLMHeadModel XLNetLMHeadModel BartForCausalLM ArceeForCausalLM
ApertusForCausalLM SeedOssForCausalLM HeliumForCausalLM PersimmonForCausalLM XGLMForCausalLM BioGptForCausalLM
OlmoForCausalLM Ernie4_5ForCausalLM
"""
_EXPERTS = """
MixtralForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM OlmoeForCausalLM GraniteMoeForCausalLM PhimoeForCausalLM
GptOssForCausalLM Ernie4_5_MoeForCausalLM JetMoeForCausalLM
FlexOlmoForCausalLM MiniMaxForCausalLM
"""
_EXPERTS_WITHOUT = "DeepseekV3ForCausalLM Glm4MoeForCausalLM"
_STATES = """
MambaForCausalLM Mamba2ForCausalLM JambaForCausalLM FalconH1ForCausalLM RwkvForCausalLM Lfm2ForCausalLM
FalconMambaForCausalLM BambaForCausalLM RecurrentGemmaForCausalLM Qwen3NextForCausalLM
"""
_ENCODERS = """
BertForMaskedLM BertForSequenceClassification BertForTokenClassification BertForQuestionAnswering
BertForMultipleChoice BertForPreTraining RobertaForMaskedLM RobertaForSequenceClassification
RobertaForTokenClassification RobertaForQuestionAnswering ModernBertForMaskedLM ModernBertForSequenceClassification
ModernBertForTokenClassification DebertaForMaskedLM DebertaV2ForSequenceClassification
DebertaV2ForTokenClassification ElectraForMaskedLM ElectraForSequenceClassification ElectraForPreTraining
DistilBertForMaskedLM AlbertForMaskedLM XLMRobertaForTokenClassification
CamembertForMaskedLM MPNetForMaskedLM ConvBertForMaskedLM BigBirdForMaskedLM RobertaForMultipleChoice
XLNetForSequenceClassification FNetForMaskedLM
"""
_PAIRS = """
T5ForConditionalGeneration BartForConditionalGeneration PegasusForConditionalGeneration MBartForConditionalGeneration
WhisperForConditionalGeneration MT5ForConditionalGeneration MarianMTModel M2M100ForConditionalGeneration
BlenderbotForConditionalGeneration LEDForConditionalGeneration LongT5ForConditionalGeneration
"""
_IMAGES = "ViTForImageClassification SwinForImageClassification ConvNextForImageClassification " + (
    "ResNetForImageClassification DeiTForImageClassification BeitForImageClassification Dinov2ForImageClassification"
)
_IMAGE_TEXT = """
Qwen3VLForConditionalGeneration
LlavaForConditionalGeneration Gemma3ForConditionalGeneration Idefics3ForConditionalGeneration
SmolVLMForConditionalGeneration PaliGemmaForConditionalGeneration InternVLForConditionalGeneration
"""
_SPEECH = "Wav2Vec2ForCTC HubertForCTC Wav2Vec2ForSequenceClassification"
_GENERIC = """
LlamaForSequenceClassification Qwen2ForSequenceClassification LlamaForTokenClassification Qwen2ForTokenClassification
LlamaForQuestionAnswering
"""


def _list(group: str, names: str, loops: tuple[str, ...], numbers: dict[str, Any] | None = None) -> list[Case]:
    return [Case(group, name, loops, numbers) for name in names.split()]


CASES: tuple[Case, ...] = (
    *_list("dense decoders", _DENSE, _SPOKEN),
    *_list("experts, router losses on", _EXPERTS, _SPOKEN, ROUTED),
    *_list("experts balanced without a loss", _EXPERTS_WITHOUT, _SPOKEN),
    *_list("state space and hybrids", _STATES, _SPOKEN),
    *_list("encoders", _ENCODERS, _OTHER),
    *_list("encoder-decoders", _PAIRS, _OTHER),
    Case("encoder-decoders", "SwitchTransformersForConditionalGeneration", _OTHER),
    *_list("images", _IMAGES, _OTHER),
    *_list(
        "images and text, trained on text",
        "Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration",
        _SPOKEN,
        _ROTARY,
    ),
    *_list("images and text, trained on text", _IMAGE_TEXT, _SPOKEN),
    Case("images and text, trained on text", "Qwen3VLMoeForConditionalGeneration", _SPOKEN, {"text_config": ROUTED}),
    Case("images and text, trained on text", "Glm4vForConditionalGeneration", _SPOKEN, _PART_ROTARY),
    *_list("speech", _SPEECH, _OTHER),
    Case("speech", "Wav2Vec2ForCTC", _OTHER, {"ctc_loss_reduction": "mean"}, "mean"),
    *_list("generic heads of decoders", _GENERIC, _OTHER),
    Case("generic heads of decoders", "LlamaForSequenceClassification", _OTHER, {"num_labels": 1}, "regression"),
)
_OLD = (
    "LlamaForCausalLM", "Qwen2ForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "T5ForConditionalGeneration",
    "BertForMaskedLM", "BertForSequenceClassification", "LlavaForConditionalGeneration", "ViTForImageClassification",
)  # fmt: skip
OLD_CASES: tuple[Case, ...] = tuple(case for case in CASES if case.name in _OLD)
"""A class of each kind, for releases that are still in use."""

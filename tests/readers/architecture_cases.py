"""Small configs, one odd feature each, whose parameters are compared with transformers' own count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Config = dict[str, Any]

_SIZES: Config = {
    "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 48, "pad_token_id": None,
}  # fmt: skip
_MOE: Config = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MLA: Config = _SIZES | _MOE | {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 10, "n_routed_experts": 6, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
_PLAIN: Config = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
_GPT2: Config = {
    "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 48, "vocab_size": 97, "pad_token_id": None,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_T5: Config = {"d_model": 64, "d_kv": 12, "d_ff": 80, "num_layers": 3, "num_heads": 4, "vocab_size": 97}
_BART: Config = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 80, "decoder_ffn_dim": 72, "vocab_size": 97,
    "max_position_embeddings": 48,
}  # fmt: skip
_VIT: Config = {
    "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_SIGLIP: Config = _VIT | {"model_type": "siglip_vision_model", "vision_use_head": False}
_GEMMA: Config = _SIZES | {"head_dim": 24}
_GEMMA4: Config = _GEMMA | {
    "num_hidden_layers": 7, "vocab_size_per_layer_input": 53, "hidden_size_per_layer_input": 6, "global_head_dim": 40,
}  # fmt: skip
_GEMMA4_VISION: Config = {
    "model_type": "gemma4_vision", "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "patch_size": 4, "position_embedding_size": 20,
}  # fmt: skip
_GEMMA4_AUDIO: Config = {
    "model_type": "gemma4_audio", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "output_proj_dims": 40, "subsampling_conv_channels": [8, 4],
}  # fmt: skip
_LABELS: Config = {"id2label": {str(label): str(label) for label in range(5)}}

# model_type -> sizes, then the changes to try, each on its own.
_VARIANTS: dict[str, tuple[Config, tuple[Config, ...]]] = {
    "llama": (
        _SIZES,
        (
            {}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 24},
            {"num_key_value_heads": None}, {"num_hidden_layers": 1}, {"torch_dtype": "float16"},
        ),
    ),
    "mistral": (_SIZES, ({}, {"sliding_window": None}, {"head_dim": 40, "num_key_value_heads": 1})),
    "ministral": (
        _GEMMA,
        (
            {}, {"head_dim": 16}, {"sliding_window": None},
            {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 3},
        ),
    ),
    "ministral3": (_SIZES, ({}, {"head_dim": 24, "sliding_window": 16})),
    "mixtral": (
        _SIZES, ({"num_local_experts": 4}, {"num_local_experts": 3, "num_experts_per_tok": 1, "head_dim": 24})
    ),
    "qwen2": (
        _SIZES,
        (
            {}, {"tie_word_embeddings": True}, {"use_sliding_window": True, "max_window_layers": 2}, {"head_dim": 24},
            {"layer_types": ["full_attention"] * 4 + ["sliding_attention"], "use_sliding_window": True},
        ),
    ),
    "qwen2_moe": (
        _SIZES | _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 40},
        (
            {}, {"qkv_bias": False}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0, 3]}, {"head_dim": 24},
            {"decoder_sparse_step": 2, "mlp_only_layers": [1], "use_sliding_window": True, "max_window_layers": 3},
        ),
    ),
    "qwen3": (_SIZES, ({}, {"head_dim": 24}, {"attention_bias": True, "tie_word_embeddings": True})),
    "qwen3_moe": (
        _SIZES | _MOE | {"num_experts": 4},
        ({}, {"attention_bias": True, "head_dim": 24}, {"mlp_only_layers": [0]}, {"num_experts": 0},
         {"decoder_sparse_step": 3}, {"tie_word_embeddings": True}),
    ),
    "gemma": (_GEMMA, ({}, {"attention_bias": True}, {"tie_word_embeddings": False, "num_key_value_heads": 1})),
    "gemma2": (_GEMMA, ({}, {"attention_bias": True}, {"tie_word_embeddings": False, "sliding_window": 8})),
    "gemma3_text": (
        _GEMMA,
        (
            {}, {"sliding_window_pattern": 2}, {"attention_bias": True}, {"tie_word_embeddings": False},
            {"layer_types": ["full_attention"] * 5}, {"use_bidirectional_attention": True},
        ),
    ),
    "phi": (_SIZES, ({}, {"qk_layernorm": True}, {"num_key_value_heads": None}, {"tie_word_embeddings": True})),
    "phi3": (
        _SIZES | {"pad_token_id": 0, "eos_token_id": 0}, ({}, {"sliding_window": 16}, {"tie_word_embeddings": True})
    ),
    "gpt2": (_GPT2, ({}, {"n_inner": 80}, {"tie_word_embeddings": False})),
    "gpt_neox": (
        _PLAIN, ({}, {"attention_bias": False}, {"use_parallel_residual": False}, {"tie_word_embeddings": True})
    ),
    "opt": (
        _PLAIN | {"ffn_dim": 80, "pad_token_id": 1},
        (
            {}, {"word_embed_proj_dim": 32, "do_layer_norm_before": False}, {"enable_bias": False},
            {"_remove_final_layer_norm": True}, {"tie_word_embeddings": False}, {"word_embed_proj_dim": 32},
            {"word_embed_proj_dim": 32, "tie_word_embeddings": False},
        ),
    ),
    "bloom": (
        {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 97, "pad_token_id": None},
        ({}, {"tie_word_embeddings": False}, {"n_embed": 64}),
    ),
    "falcon": (
        _PLAIN,
        (
            {}, {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
            {"new_decoder_architecture": True, "num_kv_heads": 2},
            {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2}, {"multi_query": False},
            {"ffn_hidden_size": 48}, {"tie_word_embeddings": False}, {"parallel_attn": False},
        ),
    ),
    "olmo2": (_SIZES, ({}, {"attention_bias": True}, {"num_key_value_heads": None, "tie_word_embeddings": True})),
    "olmo3": (_SIZES, ({}, {"sliding_window": 8}, {"layer_types": ["full_attention"] * 5})),
    "granite": (_SIZES, ({}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True})),
    "smollm3": (
        _SIZES | {"pad_token_id": 0},
        (
            {}, {"no_rope_layers": [1, 1, 0, 1, 0]}, {"use_sliding_window": True, "sliding_window": 8},
            {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, {"no_rope_layer_interval": 2},
        ),
    ),
    "deepseek_v2": (
        _MLA,
        (
            {}, {"q_lora_rank": None}, {"attention_bias": True}, {"mlp_bias": True}, {"first_k_dense_replace": 0},
            {"first_k_dense_replace": 2, "n_shared_experts": 2}, {"first_k_dense_replace": 9},
        ),
    ),
    "deepseek_v3": (
        _MLA,
        (
            {}, {"q_lora_rank": None}, {"attention_bias": True}, {"first_k_dense_replace": 0, "n_shared_experts": 2},
            {"tie_word_embeddings": True}, {"num_nextn_predict_layers": 1, "quantization_config": {"bits": 8}},
        ),
    ),
    "glm4": (_GEMMA | {"pad_token_id": 0}, ({}, {"attention_bias": False}, {"tie_word_embeddings": True})),
    "glm4_moe": (
        _SIZES | _MOE | {"n_routed_experts": 6},
        ({}, {"use_qk_norm": True}, {"attention_bias": True, "head_dim": 24}, {"first_k_dense_replace": 0},
         {"first_k_dense_replace": 2, "n_shared_experts": 3}),
    ),
    "gpt_oss": (
        _GEMMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
        ({}, {"attention_bias": False}, {"layer_types": ["sliding_attention"] * 5}, {"tie_word_embeddings": True}),
    ),
    "gemma4_text": (
        _GEMMA4,
        (
            {}, {"hidden_size_per_layer_input": 0}, {"num_kv_shared_layers": 2, "layer_types": [
                "sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention",
                "sliding_attention", "full_attention"]},
            {"attention_k_eq_v": True, "num_global_key_value_heads": 1}, {"num_global_key_value_heads": 1},
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 20},
            {"num_kv_shared_layers": 3, "use_double_wide_mlp": True, "layer_types": ["full_attention"] * 7},
            {"attention_bias": True, "tie_word_embeddings": False}, {"layer_types": ["sliding_attention"] * 7},
            {"per_layer_config": {key: {"head_dim": 8, "num_key_value_heads": 1} for key in "56"}},
            {"per_layer_config": {str(layer): {"head_dim": 8} for layer in range(5)}},
        ),
    ),
    "gemma3": (
        {},
        (
            {"text_config": _GEMMA, "vision_config": _SIGLIP, "mm_tokens_per_image": 4},
            {"text_config": _GEMMA | {"sliding_window_pattern": 2}, "vision_config": _SIGLIP | {"patch_size": 4},
             "mm_tokens_per_image": 16, "tie_word_embeddings": False},
        ),
    ),
    "gemma4": (
        {},
        (
            {"text_config": _GEMMA4}, {"text_config": _GEMMA4, "vision_config": _GEMMA4_VISION},
            {"text_config": _GEMMA4, "vision_config": _GEMMA4_VISION, "audio_config": _GEMMA4_AUDIO},
            {"text_config": _GEMMA4, "vision_config": _GEMMA4_VISION | {"use_clipped_linears": True},
             "audio_config": _GEMMA4_AUDIO | {"conv_kernel_size": 3}, "tie_word_embeddings": False},
        ),
    ),
    "bert": (_PLAIN | {"pad_token_id": 0}, ({}, {"type_vocab_size": 1}, {"tie_word_embeddings": False})),
    "roberta": (_PLAIN | {"pad_token_id": 0}, ({}, {"type_vocab_size": 1}, {"tie_word_embeddings": False})),
    "xlm-roberta": (_PLAIN | {"pad_token_id": 0}, ({}, {"tie_word_embeddings": False})),
    "modernbert": (
        _PLAIN | {key: 0 for key in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")},
        (
            {}, {"norm_bias": True, "attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": False},
            {"decoder_bias": False, "classifier_bias": True}, {"global_attn_every_n_layers": 2},
            {"layer_types": ["sliding_attention"] * 5}, {"num_hidden_layers": 1},
        ),
    ),
    "t5": (
        _T5,
        (
            {}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, {"num_decoder_layers": 5},
            {"num_layers": 1, "relative_attention_num_buckets": 8}, {"feed_forward_proj": "gated-silu"},
        ),
    ),
    "mt5": (_T5, ({}, {"feed_forward_proj": "relu"})),
    "bart": (_BART, ({}, {"tie_word_embeddings": False})),
    "vit": (
        _VIT,
        (
            {}, {"qkv_bias": False}, {"image_size": [32, 48]}, {"patch_size": [8, 16], "num_channels": 1}, _LABELS,
            {"head_dim": 20}, {"num_labels": 3} | _LABELS,
        ),
    ),
}  # fmt: skip

_LLAMA_LIKE = {
    "llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma2", "phi3": "Phi3", "phi": "Phi", "gpt_oss": "GptOss",
    "deepseek_v3": "DeepseekV3", "gpt2": "GPT2", "gpt_neox": "GPTNeoX", "bloom": "Bloom", "falcon": "Falcon",
}  # fmt: skip
_CLASSES: dict[str, tuple[str, ...]] = {
    **{
        model_type: (prefix + "ForSequenceClassification", prefix + "ForTokenClassification", prefix + "Model")
        for model_type, prefix in _LLAMA_LIKE.items()
    },
    "opt": ("OPTForSequenceClassification", "OPTForQuestionAnswering", "OPTModel"),
    "llama ": ("LlamaForQuestionAnswering",),
    "gemma3_text": ("Gemma3TextForSequenceClassification", "Gemma3TextModel"),
    "gemma3": ("Gemma3ForSequenceClassification", "Gemma3Model"),
    "gemma4_text": ("Gemma4TextModel",),
    "bert": (
        "BertModel", "BertForPreTraining", "BertLMHeadModel", "BertForSequenceClassification",
        "BertForTokenClassification", "BertForQuestionAnswering",
    ),
    "roberta": (
        "RobertaModel", "RobertaForCausalLM", "RobertaForSequenceClassification", "RobertaForTokenClassification",
        "RobertaForQuestionAnswering",
    ),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaForSequenceClassification"),
    "modernbert": (
        "ModernBertModel", "ModernBertForSequenceClassification", "ModernBertForTokenClassification",
        "ModernBertForQuestionAnswering",
    ),
    "t5": (
        "T5Model", "T5EncoderModel", "T5ForSequenceClassification", "T5ForTokenClassification",
        "T5ForQuestionAnswering",
    ),
    "bart": ("BartModel", "BartForSequenceClassification"),
    "vit": ("ViTModel",),
}  # fmt: skip


def architecture_cases() -> Iterator[tuple[str, Config]]:
    """Yield a test id and a config for every case."""
    for model_type, (sizes, variants) in _VARIANTS.items():
        for variant in variants:
            config = {"model_type": model_type, **sizes, **variant}
            yield f"{model_type}-{'-'.join(variant) or 'plain'}", config
    for model_type, classes in _CLASSES.items():
        model_type = model_type.strip()
        sizes, variants = _VARIANTS[model_type]
        for name in classes:
            yield name, {"model_type": model_type, **sizes, **variants[0], **_LABELS, "architectures": [name]}

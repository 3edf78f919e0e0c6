"""Tiny random models of every architecture family brim's formula knows, built by transformers itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig

VOCABULARY, LENGTH, BATCH = 512, 128, 2
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attention_dropout": 0.0, "use_cache": False,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 192}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 8, "kv_lora_rank": 64, "q_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1,
    "topk_group": 1, **_EXPERTS,
}  # fmt: skip
_BERT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2}
_GPT: dict[str, Any] = {"n_embd": 256, "n_head": 8, "n_positions": 512}
_NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 8, "shared_expert_intermediate_size": 320, **_EXPERTS}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 32, "num_experts": 8, **_EXPERTS}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32}),
    "gemma3_text": ("gemma3_text", {"head_dim": 32}),
    "phi": ("phi", {"num_key_value_heads": 8, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi3": ("phi3", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt2": ("gpt2", {**_GPT, **_NO_DROPOUT}),
    "gpt_neox": ("gpt_neox", {"hidden_dropout": 0.0}),
    "gpt_neox_serial": ("gpt_neox", {"hidden_dropout": 0.0, "use_parallel_residual": False}),
    "opt": ("opt", {"ffn_dim": 1024, "dropout": 0.0, "word_embed_proj_dim": 256}),
    "bloom": ("bloom", {"n_head": 8, "hidden_dropout": 0.0}),
    "falcon_7b": ("falcon", {"hidden_dropout": 0.0}),
    "falcon_40b": ("falcon", {"hidden_dropout": 0.0, "new_decoder_architecture": True, "num_kv_heads": 4}),
    "falcon_rw": ("falcon", {
        "hidden_dropout": 0.0, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True,
    }),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 384}),
    "deepseek_v2": ("deepseek_v2", {**_LATENT, "topk_method": "greedy", "head_dim": 16}),
    "deepseek_v3": ("deepseek_v3", {**_LATENT, "head_dim": 16}),
    "gpt_oss": ("gpt_oss", {
        "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 32, "intermediate_size": 192,
    }),
    "glm4": ("glm4", {"head_dim": 32}),
    "glm4_moe": ("glm4_moe", {
        "head_dim": 32, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1,
        "topk_group": 1, **_EXPERTS,
    }),
    "bert": ("bert", _BERT),
    "roberta": ("roberta", {**_BERT, "max_position_embeddings": 514}),
    "modernbert": ("modernbert", {
        "embedding_dropout": 0.0, "mlp_dropout": 0.0, "global_attn_every_n_layers": 1, "local_attention": 64,
    }),
    "t5": ("t5", {
        "d_model": 256, "d_kv": 32, "d_ff": 640, "num_heads": 8, "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }),
    "t5_gated": ("t5", {
        "d_model": 256, "d_kv": 32, "d_ff": 640, "num_heads": 8, "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
    }),
    "bart": ("bart", {
        "d_model": 256, "encoder_ffn_dim": 640, "decoder_ffn_dim": 640, "encoder_attention_heads": 8,
        "decoder_attention_heads": 8, "dropout": 0.0, "activation_dropout": 0.0, "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    }),
    "vit": ("vit", {**_BERT, "image_size": 176, "patch_size": 16}),
}  # fmt: skip
# As their configs train: with dropout wherever the architecture has it.
_DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "gpt_neox": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "t5": {"dropout_rate": 0.1},
    "t5_gated": {"dropout_rate": 0.1},
    "bart": {"dropout": 0.1, "activation_dropout": 0.1, "attention_dropout": 0.1},
}  # fmt: skip
FAMILIES |= {
    f"{name}_dropout": (FAMILIES[name][0], FAMILIES[name][1] | numbers) for name, numbers in _DROPOUT.items()
}
_CLASSES = {
    "bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification",
    "modernbert": "ModernBertForSequenceClassification", "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration", "vit": "ViTForImageClassification",
}  # fmt: skip


def tiny_config(family: str, depth: int, *, attention: str = "sdpa") -> transformers.PretrainedConfig:
    """Return the config of a tiny model with `depth` layers (in each stack)."""
    model_type, numbers = FAMILIES[family]
    layers: dict[str, Any] = {"num_hidden_layers": depth}
    if model_type in ("t5", "bart"):
        layers = {"num_layers": depth, "num_decoder_layers": depth, "encoder_layers": depth, "decoder_layers": depth}
    elif model_type == "smollm3":
        layers["no_rope_layers"] = [1, 0] * (depth // 2)
    elif model_type in ("gpt2", "bloom"):
        layers = {"n_layer": depth}
    config = AutoConfig.for_model(model_type, **(_COMMON | numbers | layers))
    config._attn_implementation = attention
    config.architectures = [tiny_class(config).__name__]
    return config


def tiny_class(config: transformers.PretrainedConfig) -> type[transformers.PreTrainedModel]:
    """Return the class that is trained."""
    name = _CLASSES.get(config.model_type)
    if name is None:
        name = transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__
    return getattr(transformers, name)


def build_tiny(config: transformers.PretrainedConfig, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Return the model with random weights, experts in one grouped product as on CUDA."""
    torch.manual_seed(0)
    model = tiny_class(config)(config).to(dtype)
    if any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("grouped_mm")
    return model.train()


def tiny_inputs(config: transformers.PretrainedConfig, batch: int = BATCH) -> Mapping[str, torch.Tensor]:
    """Return a micro-batch whose sequences are all full."""
    generator = torch.Generator().manual_seed(0)
    if config.model_type == "vit":
        pixels = torch.randn(batch, 3, config.image_size, config.image_size, generator=generator)
        return {"pixel_values": pixels, "labels": torch.zeros(batch, dtype=torch.long)}
    ids = torch.randint(3, VOCABULARY, (batch, LENGTH), generator=generator)
    if config.model_type in ("bert", "roberta", "modernbert"):
        return {"input_ids": ids, "labels": torch.zeros(batch, dtype=torch.long)}
    return {"input_ids": ids, "labels": ids.clone()}

"""transformers' decoder-only architectures, one record per `model_type`.

A new architecture of the usual kind is a new record here and nothing else. `defaults` are the values of
the installed `configuration_<model_type>.py` for keys that hub configs leave out; keys in neither config
nor defaults (`hidden_size`, `num_hidden_layers`, `num_attention_heads`) are required.

Source: transformers 5.23 `models/<model_type>/configuration_*.py` and `modeling_*.py`.
"""

from __future__ import annotations

from typing import Any

from brim.readers.decoder_facts import DecoderFacts, ExpertFacts

_FUSED_GATED = ("gate_up_proj", "down_proj")
_FC = ("fc1", "fc2")
_4H = ("dense_h_to_4h", "dense_4h_to_h")


def _defaults(**keys: Any) -> dict[str, Any]:
    """Return defaults common to decoders, then those of one of them."""
    return {
        "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "num_labels": 2,
        "sliding_window": None, "use_sliding_window": False, "layer_types": None,
        "use_bidirectional_attention": None, "final_logit_softcapping": None, "per_layer_config": None,
        "add_cross_attention": False,
    } | keys  # fmt: skip


_LLAMA = _defaults(vocab_size=32000, intermediate_size=11008)
_MISTRAL = _defaults(
    vocab_size=32000, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072,
    sliding_window=4096,
)  # fmt: skip
_MINISTRAL = {key: value for key, value in _MISTRAL.items() if key != "head_dim"}
_QWEN = _defaults(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
    sliding_window=4096, max_window_layers=28,
)  # fmt: skip
_GEMMA = _defaults(
    vocab_size=256000, intermediate_size=9216, num_key_value_heads=4, head_dim=256, max_position_embeddings=8192,
    tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh", sliding_window=4096,
)  # fmt: skip
_GEMMA3 = _GEMMA | {
    "vocab_size": 262208, "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8,
    "max_position_embeddings": 131072, "sliding_window_pattern": 6,
}  # fmt: skip
_DEEPSEEK = _defaults(kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
_EXPERT_ALIASES = {"num_local_experts": "num_experts", "n_routed_experts": "num_experts"}

DECODERS: dict[str, DecoderFacts] = {
    "llama": DecoderFacts(
        prefixes=("Llama",), defaults=_LLAMA, query_bias="attention_bias", output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": DecoderFacts(prefixes=("Mistral",), defaults=_MISTRAL, window="all"),
    "ministral": DecoderFacts(prefixes=("Ministral",), defaults=_MINISTRAL, window="listed"),
    "ministral3": DecoderFacts(
        prefixes=("Ministral3",), window="all",
        defaults=_MISTRAL | {
            "vocab_size": 131072, "head_dim": 128, "max_position_embeddings": 262144, "sliding_window": None,
        },
    ),
    "mixtral": DecoderFacts(
        prefixes=("Mixtral",), window="all", aliases=_EXPERT_ALIASES,
        defaults=_MISTRAL | {"sliding_window": None, "num_experts": 8, "num_experts_per_tok": 2},
        experts=ExpertFacts(sparse="all", width="intermediate_size", separate_names=("w1", "w3", "w2")),
    ),
    "qwen2": DecoderFacts(
        prefixes=("Qwen2",), defaults=_QWEN, query_bias=True, window="late", window_if="use_sliding_window"
    ),
    "qwen2_moe": DecoderFacts(
        prefixes=("Qwen2Moe",), query_bias="qkv_bias", window="early_even", window_if="use_sliding_window",
        defaults=_QWEN | {
            "intermediate_size": 5632, "num_key_value_heads": 16, "qkv_bias": True, "decoder_sparse_step": 1,
            "mlp_only_layers": None, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
            "num_experts": 60, "num_experts_per_tok": 4,
        },
        experts=ExpertFacts(sparse="stepped", shared="gated", rerouted=False),
    ),
    "qwen3": DecoderFacts(
        prefixes=("Qwen3",), defaults=_QWEN | {"head_dim": 128}, query_bias="attention_bias",
        output_bias="attention_bias", qk_norm="head", window="late", window_if="use_sliding_window",
    ),
    "qwen3_moe": DecoderFacts(
        prefixes=("Qwen3Moe",), query_bias="attention_bias", output_bias="attention_bias", qk_norm="head",
        window="all", window_if="use_sliding_window", aliases=_EXPERT_ALIASES,
        defaults=_QWEN | {
            "intermediate_size": 6144, "num_key_value_heads": 4, "decoder_sparse_step": 1, "mlp_only_layers": None,
            "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        },
        experts=ExpertFacts(sparse="stepped"),
    ),
    "gemma": DecoderFacts(
        prefixes=("Gemma",), query_bias="attention_bias", output_bias="attention_bias",
        defaults=_GEMMA | {"intermediate_size": 24576, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma2": DecoderFacts(
        prefixes=("Gemma2",), num_norms=4, query_bias="attention_bias", output_bias="attention_bias",
        activation="hidden_activation", window="periodic", window_period=2,
        defaults=_GEMMA | {"final_logit_softcapping": 30.0},
    ),
    "gemma3_text": DecoderFacts(
        prefixes=("Gemma3", "Gemma3Text"), defaults=_GEMMA3, num_norms=4, query_bias="attention_bias",
        output_bias="attention_bias", qk_norm="head", activation="hidden_activation", window="periodic",
        window_period="sliding_window_pattern",
    ),
    "phi": DecoderFacts(
        prefixes=("Phi",), norm="layernorm", num_norms=1, parallel=True, query_bias=True, output_bias=True,
        projections=("q_proj", "k_proj", "v_proj", "dense"), qk_norm="head", qk_norm_if="qk_layernorm",
        mlp=_FC, mlp_bias=True, language_head_bias=True,
        defaults=_defaults(vocab_size=51200, intermediate_size=8192, hidden_act="gelu_new", qk_layernorm=False),
    ),
    "phi3": DecoderFacts(
        prefixes=("Phi3",), projections=("qkv_proj", "o_proj"), mlp=_FUSED_GATED, window="all",
        defaults=_defaults(vocab_size=32064, intermediate_size=8192, max_position_embeddings=4096),
    ),
    "gpt2": DecoderFacts(
        prefixes=("GPT2",), norm="layernorm", square=True, width="n_inner", query_bias=True, output_bias=True,
        projections=("c_attn", "c_proj"), rotary=False, mlp=("c_fc", "c_proj"), mlp_bias=True,
        activation="activation_function", embedding="wte", positions=("wpe", 0), language_head="LMHeadModel",
        token_head="classifier",
        aliases={
            "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
        },
        defaults=_defaults(
            vocab_size=50257, n_inner=None, max_position_embeddings=1024, tie_word_embeddings=True,
            activation_function="gelu_new",
        ),
    ),
    "gpt_neox": DecoderFacts(
        prefixes=("GPTNeoX",), norm="layernorm", square=True, parallel="use_parallel_residual",
        query_bias="attention_bias", output_bias="attention_bias", projections=("query_key_value", "dense"),
        mlp=_4H, mlp_bias=True, embedding="embed_in", token_head="classifier",
        defaults=_defaults(
            vocab_size=50432, intermediate_size=24576, hidden_act="gelu", attention_bias=True,
            use_parallel_residual=True,
        ),
    ),
    "opt": DecoderFacts(
        prefixes=("OPT",), norm="layernorm", square=True, width="ffn_dim", query_bias="enable_bias",
        output_bias="enable_bias", rotary=False,
        projections=("q_proj", "k_proj", "v_proj", "out_proj"), mlp=_FC, mlp_bias="enable_bias",
        activation="activation_function", positions=("embed_positions", 2),
        defaults=_defaults(
            vocab_size=50272, ffn_dim=3072, tie_word_embeddings=True, activation_function="relu",
            enable_bias=True, word_embed_proj_dim=None, do_layer_norm_before=True, _remove_final_layer_norm=False,
            layer_norm_elementwise_affine=True,
        ),
    ),
    "bloom": DecoderFacts(
        prefixes=("Bloom",), norm="layernorm", square=True, width=None, query_bias=True, output_bias=True, rotary=False,
        projections=("query_key_value", "dense"), mlp=_4H, mlp_bias=True, embedding="word_embeddings",
        embedding_norm=True, token_head="classifier",
        aliases={"n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
        defaults=_defaults(
            vocab_size=250880, hidden_act="gelu", tie_word_embeddings=True,
            max_position_embeddings=None,
        ),
    ),
    "falcon": DecoderFacts(
        prefixes=("Falcon",), norm="layernorm", square=True, width="ffn_hidden_size", query_bias="bias",
        output_bias="bias", projections=("query_key_value", "dense"), mlp=_4H, mlp_bias="bias", activation="activation",
        embedding="word_embeddings", token_head="classifier",
        aliases={"n_embed": "hidden_size"},
        defaults=_defaults(
            vocab_size=65024, ffn_hidden_size=None, activation="gelu", tie_word_embeddings=True, num_kv_heads=None,
            alibi=False, new_decoder_architecture=False, multi_query=True, parallel_attn=True, bias=False,
            num_ln_in_parallel_attn=None,
        ),
    ),
    "olmo2": DecoderFacts(
        prefixes=("Olmo2",), query_bias="attention_bias", output_bias="attention_bias", qk_norm="full",
        defaults=_LLAMA | {"vocab_size": 50304},
    ),
    "olmo3": DecoderFacts(
        prefixes=("Olmo3",), query_bias="attention_bias", output_bias="attention_bias", qk_norm="full",
        window="periodic", window_period=4, defaults=_LLAMA | {"vocab_size": 50304, "sliding_window": 4096},
    ),
    "granite": DecoderFacts(
        prefixes=("Granite",), defaults=_LLAMA, query_bias="attention_bias", output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "smollm3": DecoderFacts(
        prefixes=("SmolLM3",), query_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias",
        window="unrotated", window_if="use_sliding_window",
        defaults=_defaults(
            vocab_size=128256, intermediate_size=11008, num_key_value_heads=4, max_position_embeddings=32768,
            tie_word_embeddings=True, no_rope_layers=None, no_rope_layer_interval=4,
        ),
    ),
    "deepseek_v2": DecoderFacts(
        prefixes=("DeepseekV2",), attention="latent", query_bias="attention_bias", output_bias="attention_bias",
        mlp_bias="mlp_bias", aliases=_EXPERT_ALIASES,
        defaults=_DEEPSEEK | {
            "vocab_size": 102400, "intermediate_size": 11008, "first_k_dense_replace": 0, "num_experts": 64,
            "n_shared_experts": 2, "moe_intermediate_size": 1407,
        },
        experts=ExpertFacts(sparse="after_dense", shared="several"),
    ),
    "deepseek_v3": DecoderFacts(
        prefixes=("DeepseekV3",), attention="latent", query_bias="attention_bias", output_bias="attention_bias",
        aliases=_EXPERT_ALIASES,
        defaults=_DEEPSEEK | {
            "vocab_size": 129280, "intermediate_size": 18432, "max_position_embeddings": 4096,
            "first_k_dense_replace": 3, "num_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
            "moe_intermediate_size": 2048, "num_key_value_heads": 128,
        },
        experts=ExpertFacts(sparse="after_dense", shared="several", bare_router=True),
    ),
    "glm4": DecoderFacts(
        prefixes=("Glm4",), num_norms=4, query_bias="attention_bias", mlp=_FUSED_GATED,
        defaults=_defaults(
            vocab_size=151552, intermediate_size=13696, num_key_value_heads=2, head_dim=128,
            max_position_embeddings=131072, attention_bias=True,
        ),
    ),
    "glm4_moe": DecoderFacts(
        prefixes=("Glm4Moe",), query_bias="attention_bias", qk_norm="head", qk_norm_if="use_qk_norm",
        aliases=_EXPERT_ALIASES,
        defaults=_defaults(
            vocab_size=151552, intermediate_size=10944, num_key_value_heads=8, max_position_embeddings=131072,
            use_qk_norm=False, first_k_dense_replace=1, num_experts=128, num_experts_per_tok=8, n_shared_experts=1,
            moe_intermediate_size=1408,
        ),
        experts=ExpertFacts(sparse="after_dense", shared="several", bare_router=True),
    ),
    "gpt_oss": DecoderFacts(
        prefixes=("GptOss",), query_bias="attention_bias", output_bias="attention_bias", sinks=True,
        window="periodic", window_period=2, aliases=_EXPERT_ALIASES,
        defaults=_defaults(
            vocab_size=201088, intermediate_size=2880, num_key_value_heads=8, head_dim=64, attention_bias=True,
            max_position_embeddings=131072, sliding_window=128, num_experts=128, num_experts_per_tok=4,
        ),
        experts=ExpertFacts(
            sparse="all", width="intermediate_size", router="router", bias=True, bare_experts=True, bare_router=True,
            rerouted=False,
        ),
    ),
}  # fmt: skip
# Moonshot's Kimi K2 is DeepSeek-V3 with other numbers; its remote code only renames the config class.
DECODERS["kimi_k2"] = DECODERS["deepseek_v3"]

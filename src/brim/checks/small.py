"""A small copy of the user's model class: the same code path, a few layers, on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from brim.checks.silence import silenced
from brim.errors import ProbeFailed

_SMALL_ENOUGH = 30_000_000
"""Parameters of a model that is verified as it is."""
_SHALLOW = 2
_DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "encoder_num_hidden_layers", "depth",
)  # fmt: skip
_WIDTHS: dict[str, int] = {
    **dict.fromkeys(_DEPTHS, _SHALLOW),
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32, "pooler_hidden_size": 32, "out_hidden_size": 32, "attention_hidden_size": 32,
    "intermediate_size": 64, "ffn_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "ffn_hidden_size": 64,
    "d_ff": 64, "dff": 64, "d_inner": 64, "n_inner": 64, "hidden_dim": 64, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "hidden_size_per_layer_input": 8, "laurel_rank": 8, "lru_width": 32,
    "num_kv_shared_layers": 0,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "head_dim": 8, "d_kv": 8, "d_head": 8, "rotary_dim": 8,
    "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "state_size": 8, "n_groups": 1, "chunk_size": 16,
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16,
    "mamba_n_groups": 1, "image_size": 32, "patch_size": 8,
    "max_source_positions": 64, "max_target_positions": 128,
}  # fmt: skip
"""Values of a small model by the config's key: consistent with each other, and small enough for one core."""
_KEY_VALUE_HEADS = ("num_key_value_heads", "multi_query_group_num", "num_kv_heads")
_STAGES = {"depths": (1,), "hidden_sizes": (8, 16, 32, 64), "conv_dim": (16,)}
"""Values of each stage of a small model that has several; the last one is repeated."""
_NESTED = ("text_config", "vision_config", "encoder", "decoder", "audio_config", "llm_config")
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "sliding_window_pattern")
_DROPOUTS = ("drop", "layerdrop", "mask_time_prob", "mask_feature_prob", "jitter")


def shrink_config(config: Mapping[str, Any], vocabulary: int | None = None) -> dict[str, Any]:
    """Return the config of a model of the same class with about two narrow layers and no dropout.

    Grouped heads stay grouped, patterns of layers keep their first two.

    Args:
        config: as `config.json` has it.
        vocabulary: tokens of the small model; as many as the config says if None, since the user's data index them.
    """
    small = copy.deepcopy(dict(config))
    for key, value in config.items():
        if key in _NESTED and isinstance(value, Mapping):
            small[key] = shrink_config(value, vocabulary)
        elif vocabulary is not None and _is_number(value) and _is_token(key):
            small[key] = vocabulary if "vocab_size" in key else min(int(value), vocabulary - 1)
        elif _is_number(value) and any(word in key for word in _DROPOUTS):
            small[key] = 0.0
        elif _is_number(value) and key in _WIDTHS:
            small[key] = min(int(value), _WIDTHS[key]) if value else value
        elif isinstance(value, (list, tuple)) and (key in _PER_LAYER or _is_per_layer(config, value)):
            small[key] = [min(one, _WIDTHS.get(key, one)) if _is_number(one) else one for one in value[:2]]
        elif isinstance(value, (list, tuple)) and key in _STAGES:
            small[key] = _fill_stages(value, _STAGES[key])
        elif key == "per_layer_config" and isinstance(value, Mapping):
            small[key] = {layer: one for layer, one in value.items() if int(layer) < _SHALLOW}
    _fit_stages(config, small)
    _fit_states(small)
    return _fit_heads(config, small, vocabulary)


def _is_per_layer(config: Mapping[str, Any], values: Sequence[Any]) -> bool:
    layers = next((config[key] for key in _DEPTHS if _is_number(config.get(key))), None)
    return len(values) > _SHALLOW and len(values) == layers and "depths" not in config and "conv_dim" not in config


def _fill_stages(values: Sequence[Any], wanted: Sequence[int]) -> list[int]:
    filled = [*wanted, *[wanted[-1]] * len(values)]
    return [min(value, small) for value, small in zip(values, filled, strict=False)]


def _fit_stages(config: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Make what is written down once for each stage, or for each run of layers, as small as the rest."""
    heads = config.get("num_heads")
    if isinstance(heads, (list, tuple)) and heads:
        small["num_heads"] = [head // heads[0] for head in heads]
        if "window_size" in config:
            small["window_size"] = 1  # the last stage has a single place
    if "depths" not in config:  # the names of stages that are cut off
        for key in ("out_features", "out_indices", "stage_names"):
            small.pop(key, None)
    elif _is_number(config.get("num_layers")):
        small["num_layers"] = config["num_layers"]
    runs = config.get("attention_types")
    if isinstance(runs, (list, tuple)) and runs:
        kinds = runs[0][0][:_SHALLOW]
        small["attention_types"] = [[kinds, _SHALLOW // len(kinds)]]


def _fit_states(small: dict[str, Any]) -> None:
    """Make the heads of a state space as wide as it is."""
    for keys in (("expand", "num_heads", "head_dim"), ("mamba_expand", "mamba_n_heads", "mamba_d_head")):
        expand, heads, width = (small.get(key) for key in keys)
        if _is_number(expand) and _is_number(heads) and _is_number(width) and not small.get("mamba_d_ssm"):
            small[keys[2]] = int(small.get("hidden_size", 0) * expand) // heads


def _fit_heads(config: Mapping[str, Any], small: dict[str, Any], vocabulary: int | None) -> dict[str, Any]:
    heads = next((config[key] for key in ("num_attention_heads", "n_head", "num_heads") if config.get(key)), None)
    for key in _KEY_VALUE_HEADS:
        if key in config and config[key] is None and heads is not None:
            small[key] = 4
        if _is_number(config.get(key)):
            grouped = heads is not None and config[key] < heads
            small[key] = (1 if config[key] == 1 else 2) if grouped else 4
    if small.get("is_encoder_decoder") and small.get("decoder_start_token_id") is None:
        small["decoder_start_token_id"] = small.get("pad_token_id") or 0
    if vocabulary is not None and "vocab_size" in small and small.get("pad_token_id") is None:
        small["pad_token_id"] = 0
    if _is_number(small.get("max_position_embeddings")):
        small["max_position_embeddings"] = max(min(int(small["max_position_embeddings"]), 512), 128)
    for key in ("rope_parameters", "rope_scaling"):
        _fit_stretch(small, key)
        if isinstance(small.get(key), dict) and small[key].get("mrope_section"):
            half = small.get("head_dim") or small.get("hidden_size", 32) // small.get("num_attention_heads", 4)
            small[key] = {**small[key], "mrope_section": [half // 2 - 2, 1, 1]}
    return small


def _fit_stretch(small: dict[str, Any], key: str) -> None:
    """Let positions stay stretched by the same factor: shorter before, as they are shorter now."""
    rope, now = small.get(key), small.get("max_position_embeddings")
    stretched = isinstance(rope, dict) and rope.get("original_max_position_embeddings")
    if stretched and now and _is_number(rope.get("factor")):
        small[key] = {**rope, "original_max_position_embeddings": max(int(now / rope["factor"]), 1)}


def _is_token(key: str) -> bool:
    """Return whether a key of a config counts tokens or names one."""
    return key.endswith(("vocab_size", "vocab_size_per_layer_input", "token_id", "token_index", "token_ids"))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shrink_model(model: nn.Module) -> nn.Module:
    """Return a small CPU copy of a model of transformers or PEFT, dropout off; the model's own copy if it is small.

    Raises:
        ProbeFailed: the class cannot be built from a smaller config.
    """
    if sum(parameter.numel() for parameter in model.parameters()) <= _SMALL_ENOUGH:
        return quiet(copy.deepcopy(model).to("cpu", torch.float32))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if config is None:
        raise ProbeFailed(f"{type(model).__name__} has no config to build a small copy from; pass a small model")
    small = build_small(type(base), config.to_dict(), type(config))
    if base is not model:
        from peft import get_peft_model

        small = get_peft_model(small, copy.deepcopy(next(iter(model.peft_config.values()))))
    return quiet(small)


def build_small(kind: type, config: Mapping[str, Any], config_class: Any, vocabulary: int | None = None) -> nn.Module:
    """Return a small model of a class with random weights.

    Args:
        kind: a model class of transformers.
        config: as `config.json` has it.
        config_class: its config's class.
        vocabulary: tokens of the small model; the config's if None.
    """
    torch.manual_seed(0)
    try:
        with silenced():
            return quiet(_build(kind, config, config_class, vocabulary))
    except Exception as error:
        raise ProbeFailed(
            f"{kind.__name__} cannot be built small: {type(error).__name__}: {' '.join(str(error).split())[:200]}; "
            "give a small config of it"
        ) from error


def _build(kind: type, config: Mapping[str, Any], config_class: Any, vocabulary: int | None) -> nn.Module:
    whole = config_class.from_dict(dict(config)).to_dict()  # with the defaults of what the file leaves out
    return kind(config_class.from_dict(shrink_config(whole, vocabulary))).to(torch.float32)


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy of a model; a state that its last forward pass left on it (recurrent layers do) loses its graph."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                setattr(module, name, value.detach())
    return copy.deepcopy(model)


def quiet(model: nn.Module) -> nn.Module:
    """Return the model with dropout off: what is random differs between any two runs."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for owner in (module, getattr(module, "config", None)):  # some call the function with a rate they keep
            rates = [name for name, value in getattr(owner, "__dict__", {}).items() if _is_rate(name, value)]
            for name in rates:
                setattr(owner, name, 0.0)
    return model


def _is_rate(name: str, value: object) -> bool:
    return isinstance(value, float) and any(word in name for word in _DROPOUTS)

"""A row of the published measurements as a question: (Workload, Strategy), from stated fields and framework facts."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from brim.cost.parameters import count_parameters, default_targets
from brim.errors import BrimError, UnknownName, UnsupportedModel
from brim.readers.hf_config import read_config
from brim.spec.data import DataProfile
from brim.spec.device import Cluster, Device
from brim.spec.model import ModelShape
from brim.spec.recipe import Engine, Lora, Quantization, Recipe
from brim.spec.strategy import Mesh, Strategy
from brim.spec.workload import BatchTarget, Workload
from brim.tables.read import Card, find_card, find_device, list_cards

Row = Mapping[str, Any]
HIDDEN_FROM_PREDICTOR = ("id", "group", "weight", "measured", "tokens_per_second", "source", "notes")
_ENGINES = tomllib.loads((Path(__file__).parent / "engines.toml").read_text(encoding="utf-8"))
_ENGINE_FIELDS = (
    "set_to_none", "logits_alive_in_backward", "upcasts_logits", "frees_narrow_logits", "copies_shifted_logits",
    "repeats_kv", "always_masks", "fused_experts", "keeps_loss_chunks", "reentrant_checkpointing",
)  # fmt: skip
_TORCHAO = {"adamw_torch_8bit": "adamw-8bit"}  # torchao: two 8-bit states, scales per 256 elements, as bitsandbytes
_QUANTIZATIONS = {"bnb-nf4": "nf4", "bnb-nf4-dq": "nf4", "bnb-fp4": "fp4", "ao-nf4": "nf4", "gptq-int4": "gptq-int4"}
_KERNELS = {None: "none", "unsloth": "unsloth", "liger": "liger", "cut-cross-entropy": "none"}
_OLD_LOSS = (4, 46)  # transformers: the first release whose loss function upcasts logits beside the 16-bit ones
_COUNT_TOLERANCE = 0.02
_WHOLE_COLUMN = 2**20  # more weights than any matrix has inputs: one scale per output


def read_row(row: Row) -> tuple[Workload, Strategy]:
    """Return the question a stripped row asks.

    Raises:
        BrimError: the row needs something the formula does not know.
    """
    facts = _ENGINES.get(row["framework"]["name"], _ENGINES["default"])
    if row["n_gpus"] != 1:
        raise UnsupportedModel(model=row["model"]["name"], what="sharding", advice="planned for later")
    shape = read_shape(row["model"], read_row_config(row))
    if facts.get("fused_activations"):
        shape = _with_fused_activations(shape)
    if facts.get("fused_qkv"):
        shape = _with_fused_qkv(shape)
    data = DataProfile(seq_len=row["seq_len"], packing=bool(row["packing"]) or row["seq_len_kind"] == "longest")
    recipe = _read_recipe(row, shape, facts)
    micro, accumulation = row["micro_batch_size"] or 1, row["gradient_accumulation_steps"] or 1
    target = BatchTarget(
        sequences=micro * accumulation, tokens=micro * accumulation * data.seq_len, low=1, high=2**20, min_useful=1,
        max_useful=2**20, reason="the row's own",
    )  # fmt: skip
    workload = Workload(
        model=shape, data=data, recipe=recipe, batch=target, cluster=Cluster(device=_read_device(row["gpu"])),
        task="fine-tuning",
    )  # fmt: skip
    return workload, _read_strategy(row, micro, accumulation, facts)


def read_model_config(model: Row) -> Mapping[str, Any]:
    """Return the config of a row's model: its card's if the name is known, a card's with the same numbers (weights
    stored in another format under another name), else one made of its numbers."""
    named = find_card(model["name"])
    for card in (named, *list_cards()) if named else list_cards():
        if abs(card.params / model["params"] - 1) < _COUNT_TOLERANCE and (card is named or _agrees(card, model)):
            return card.config
    return _config(model)


def _agrees(card: Card, model: Row) -> bool:
    """Whether every number of a row's model is that of a card."""
    numbers = {key: value for key, value in model.items() if isinstance(value, int) and key != "params"}
    return all(card.config.get(key) == value for key, value in numbers.items() if not isinstance(value, bool))


def read_row_config(row: Row) -> Mapping[str, Any]:
    """Return the config of a row's model, with the words its framework adds to the vocabulary."""
    config = read_model_config(row["model"])
    facts = _ENGINES.get(row["framework"]["name"], _ENGINES["default"])
    added = facts.get("added_tokens", {}).get(str(config.get("vocab_size")), 0)
    return {**config, "vocab_size": config["vocab_size"] + added} if added else config


def read_shape(model: Row, config: Mapping[str, Any] | None = None) -> ModelShape:
    """Return the shape of a row's model, checked against its stated count of parameters."""
    shape = read_config(config or read_model_config(model), name=model["name"])
    if abs(count_parameters(shape) / model["params"] - 1) > _COUNT_TOLERANCE:
        raise UnsupportedModel(model=model["name"], what="the architecture behind the numbers")
    return shape


def _with_fused_activations(shape: ModelShape) -> ModelShape:
    groups = tuple(
        replace(group, mlp=replace(group.mlp, hidden_act="gelu")) if group.mlp.hidden_act.startswith("gelu") else group
        for group in shape.groups
    )
    return replace(shape, groups=groups)


def _with_fused_qkv(shape: ModelShape) -> ModelShape:
    groups = []
    for group in shape.groups:
        *inputs, output = group.attention.linears
        width = sum(linear.out_features for linear in inputs)
        fused = replace(inputs[0], name="attn", out_features=width)
        groups.append(replace(group, attention=replace(group.attention, linears=(fused, output))))
    return replace(shape, groups=tuple(groups))


def _config(model: Row) -> dict[str, Any]:
    """A config of the plainest architecture with these numbers: dense or mixture, gated or not."""
    config = {key: value for key, value in model.items() if key not in ("name", "params", "gated_mlp", "num_experts")}
    if model.get("num_experts"):
        shared = model.get("shared_expert_intermediate_size")
        return config | (
            {"model_type": "glm4_moe", "n_routed_experts": model["num_experts"], "n_shared_experts": 1}
            if shared
            else {"model_type": "mixtral", "num_local_experts": model["num_experts"],
                  "intermediate_size": model["moe_intermediate_size"]}
        )  # fmt: skip
    if not model.get("gated_mlp", True):
        return config | {"model_type": "phi"}
    return config | {"model_type": "mistral" if model.get("head_dim") else "llama"}


def _read_device(gpu: Row) -> Device:
    try:
        device = find_device(gpu["name"] or "")
    except UnknownName:
        return Device(name=gpu["name"] or "unknown", capacity_bytes=gpu["memory_bytes"] or 80 * 2**30, source="row")
    return replace(device, capacity_bytes=gpu["memory_bytes"]) if gpu["memory_bytes"] else device


def _read_recipe(row: Row, shape: ModelShape, facts: Row) -> Recipe:
    extra = row["extra"] or {}
    weight = row["weight_dtype"] or "bf16"
    method = {"pretrain": "full"}.get(row["method"], row["method"])
    if method not in ("full", "lora", "qlora"):
        raise UnsupportedModel(model=row["model"]["name"], what=f"the {method} adapter")
    return Recipe(
        method=method, optimizer=_optimizer(row["optimizer"]), weight_dtype=weight,
        compute_dtype=row["compute_dtype"] or weight, autocast=bool(row["autocast"]),
        master_weights=bool(row["master_weights"]), gradient_dtype=None,
        lora=_read_lora(row, shape, facts, extra, weight) if method != "full" else None,
        quantization=_read_quantization(row, facts, extra) if row["quantization"] else None,
        engine=_read_engine(row, facts, extra, shape.model_type),
    )  # fmt: skip


def _optimizer(name: str | None) -> str:
    return _TORCHAO.get(name or "", name or "adamw")


def _read_lora(row: Row, shape: ModelShape, facts: Row, extra: Row, weight: str) -> Lora:
    stated = row["lora"] or {}
    targets = stated.get("target_modules") or default_targets(shape)
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    targets = (targets,) if isinstance(targets, str) else tuple(names.get(name, name) for name in targets)
    if facts.get("fused_qkv") and {"q_proj", "k_proj", "v_proj"} & set(targets):
        targets = ("attn", *(name for name in targets if name not in ("q_proj", "k_proj", "v_proj")))
    dtype = extra.get("adapter_dtype") or facts["adapter_dtype"]
    return Lora(
        r=stated.get("r") or 16, dropout=facts.get("lora_dropout", 0.0), alpha=float(stated.get("alpha") or 16),
        target_modules=targets, dtype=weight if dtype == "weights" else dtype,
    )  # fmt: skip


def _read_quantization(row: Row, facts: Row, extra: Row) -> Quantization:
    kind = row["quantization"] or "bnb-nf4"
    if kind not in _QUANTIZATIONS:
        raise UnsupportedModel(model=row["model"]["name"], what=f"{kind} storage")
    is_gptq = kind.startswith("gptq")
    keeps_inputs = bool(facts.get("keeps_quantised_inputs")) and not is_gptq
    by_framework = bool(facts.get("double_quant")) and not is_gptq
    group = facts.get("gptq_group_sizes", {}).get(row["model"]["name"], facts.get("gptq_group_size", 128))
    return Quantization(
        kind=_QUANTIZATIONS[kind], block_size=(group if group > 0 else _WHOLE_COLUMN) if is_gptq else 64,
        double_quant=kind.endswith("-dq") or kind.startswith("ao-") or by_framework,
        keeps_inputs=keeps_inputs, upcast_rest=bool(extra.get("kbit_upcast")),
        narrow_embeddings=bool(facts.get("narrow_embeddings")) and bool(extra.get("kbit_upcast")),
    )  # fmt: skip


def _read_engine(row: Row, facts: Row, extra: Row, model_type: str) -> Engine:
    fields = {key: facts[key] for key in _ENGINE_FIELDS if key in facts}
    if "zero_grad_set_to_none" in extra:
        fields["set_to_none"] = extra["zero_grad_set_to_none"]
    if "logits_alive_in_backward" in extra:
        fields["logits_alive_in_backward"] = extra["logits_alive_in_backward"]
    if is_old_loss(row, facts):
        fields["frees_narrow_logits"] = True
        families = facts.get("repeats_kv_families", ())
        fields["repeats_kv"] = row["attention"] == "flash" and model_type in families
    return Engine(name=row["framework"]["name"] or "unknown", evaluates=False, **fields)


def is_old_loss(row: Row, facts: Row) -> bool:
    """Whether the row ran a transformers before 4.46, by its stated version or its framework's pin at that date."""
    version = row["framework"]["version"] or facts.get("versions", {}).get(row["framework"]["date"], "")
    stated = version.partition("transformers ")[2].split(",")[0]
    return bool(stated) and tuple(int(part) for part in stated.split(".")[:2]) < _OLD_LOSS


def _read_strategy(row: Row, micro: int, accumulation: int, facts: Row) -> Strategy:
    fused_optimizer = row["optimizer"] in ("adamw_torch_fused",) or "8bit" in (row["optimizer"] or "") or "paged" in (
        row["optimizer"] or ""
    )
    kernels = facts.get("kernels", {}).get(row["kernels"] or "none") or _KERNELS.get(row["kernels"], "none")
    return Strategy(
        micro_batch_size=micro, gradient_accumulation_steps=accumulation,
        activation_checkpointing=row["activation_checkpointing"] or "none",
        attention_kernel=row["attention"] or "sdpa",
        loss_kernel=row["loss"] if row["loss"] in ("dense", "chunked", "fused") else "dense",
        optimizer_kernel="fused" if fused_optimizer else "foreach",
        layer_kernels=kernels, compile=bool(row["compile"]), mesh=Mesh(),
    )  # fmt: skip


__all__ = ["HIDDEN_FROM_PREDICTOR", "BrimError", "read_row", "read_shape"]

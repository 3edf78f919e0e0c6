"""Counts over a `ModelShape`: identities, and LoRA against PEFT itself."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.cost.parameters import (
    adapter_linears,
    count_embedding_parameters,
    count_layer_parameters,
    count_lora_parameters,
    count_matmul_parameters,
    count_parameters,
    default_targets,
    layer_linears,
    target_linears,
)
from brim.readers.hf_config import read_config
from brim.spec.model import ModelShape, Moe
from brim.spec.recipe import Lora

sys.path.insert(0, str(Path(__file__).parents[1] / "readers"))
from architecture_cases import architecture_cases

CASES = dict(architecture_cases())
CARDS = {row["id"]: row for row in map(json.loads, (files("brim.tables") / "models.jsonl").read_text().splitlines())}
SHAPES = {case: read_config(config, name=case) for case, config in CASES.items()}


def card(name: str) -> ModelShape:
    """Return the shape of a built-in card."""
    return read_config(CARDS[name]["config"], name=name)


def lora(*targets: str, r: int = 8, use_dora: bool = False) -> Lora:
    """Return an adapter."""
    return Lora(r=r, alpha=16.0, target_modules=targets, use_dora=use_dora)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parts_sum_to_the_whole(shape: ModelShape) -> None:
    head = sum(linear.num_parameters for linear in shape.head)
    if shape.tie_word_embeddings:
        head -= shape.head[-1].num_weights
        assert shape.head[-1].num_weights == shape.embeddings[0].num_parameters
    stem = sum(linear.num_parameters for linear in shape.stem)
    layers = sum(group.count * count_layer_parameters(group) for group in shape.groups)
    assert count_parameters(shape) == count_embedding_parameters(shape) + stem + layers + head + shape.other_parameters


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shape_is_consistent(shape: ModelShape) -> None:
    """Projections fit the widths that activations are counted with."""
    assert len(set(shape.groups)) == len(shape.groups)
    for group in shape.groups:
        attention = group.attention
        out = attention.linears[-1]
        assert (out.in_features, out.out_features) == (attention.out_size, group.hidden_size)
        assert attention.num_attention_heads % attention.num_key_value_heads == 0
        dense = [group.mlp] if not isinstance(group.mlp, Moe) else [group.mlp.shared] if group.mlp.shared else []
        for mlp in dense:
            assert (mlp.linears[-1].in_features, mlp.linears[-1].out_features) == (
                mlp.intermediate_size,
                group.hidden_size,
            )
            inner = sum(linear.out_features for linear in mlp.linears[:-1])
            assert inner == mlp.intermediate_size * (2 if mlp.gated else 1)
        if isinstance(group.mlp, Moe):
            gate_up, down = group.mlp.expert_linears
            assert gate_up.out_features == 2 * down.in_features == 2 * group.mlp.intermediate_size
            assert group.mlp.num_experts_per_tok <= group.mlp.num_experts == group.mlp.router.out_features


def test_a_dense_decoder_meets_all_but_its_embedding() -> None:
    shape = card("meta-llama/Llama-2-7b-hf")
    norms = (2 * 32 + 1) * 4096
    assert count_matmul_parameters(shape) == count_parameters(shape) - 32000 * 4096 - norms


def test_a_tied_head_is_multiplied_with() -> None:
    shape = card("meta-llama/Llama-3.2-1B")
    assert shape.tie_word_embeddings
    assert count_matmul_parameters(shape) == count_parameters(shape) - (2 * 16 + 1) * 2048


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", 12.9), ("Qwen/Qwen3-30B-A3B", 3.3), ("Qwen/Qwen3-235B-A22B", 22.2),
        ("openai/gpt-oss-120b", 5.1), ("Qwen/Qwen1.5-MoE-A2.7B", 2.7), ("deepseek-ai/DeepSeek-V2", 21.4),
    ],
)  # fmt: skip
def test_active_parameters_are_those_published(name: str, billions: float) -> None:
    """Published numbers count or leave out the two vocabulary tables, each its own way."""
    shape = card(name)
    active = count_matmul_parameters(shape) / 1e9
    table = shape.embeddings[0].num_parameters / 1e9
    assert active - table - 0.1 < billions < active + table + 0.1


def test_experts_are_copied_and_the_router_is_not() -> None:
    (group,) = SHAPES["mixtral-num_local_experts"].groups
    copies = {linear.name: copies for linear, copies in layer_linears(group)}
    assert copies["gate"] == copies["q_proj"] == 1
    assert copies["gate_up_proj"] == copies["down_proj"] == 4


def test_towers_are_not_met_by_text() -> None:
    text, both = SHAPES["gemma4-text_config"], SHAPES["gemma4-text_config-vision_config"]
    extra = sum(linear.num_weights for linear in both.stem) - sum(linear.num_weights for linear in text.stem)
    assert count_matmul_parameters(both) == count_matmul_parameters(text) + extra


@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 128))
def test_lora_is_linear_in_rank(case: str, r: int) -> None:
    shape = SHAPES[case]
    assert count_lora_parameters(shape, lora("all-linear", r=r), True) == r * count_lora_parameters(
        shape, lora("all-linear", r=1), True
    )


@given(st.sampled_from(sorted(SHAPES)), st.booleans())
def test_targets_of_groups_sum_to_those_of_the_model(case: str, fused: bool) -> None:
    shape = SHAPES[case]
    no_layers = replace(shape, groups=())
    outside = sum(copies for _, copies in target_linears(no_layers, ["all-linear"], fused))
    inside = sum(
        group.count * copies for group in shape.groups for _, copies in target_linears(group, ["all-linear"], fused)
    )
    assert sum(copies for _, copies in target_linears(shape, ["all-linear"], fused)) == inside + outside


def test_separate_experts_are_hit_by_their_former_names() -> None:
    shape = SHAPES["mixtral-num_local_experts"]
    hit = target_linears(shape, ["w1", "w2", "w3", "gate"], fused_experts=False)
    assert Counter({linear.name: copies for linear, copies in hit}) == {"w1": 20, "w3": 20, "w2": 20, "gate": 5}
    assert target_linears(shape, ["w1", "w2", "w3", "gate"], fused_experts=True) == ()
    deepseek = SHAPES["deepseek_v3-plain"]
    names = {linear.name for linear, _ in target_linears(deepseek, ["all-linear"], fused_experts=False)}
    assert "gate_proj" in names and "gate" not in names
    oss = SHAPES["gpt_oss-plain"]
    assert target_linears(oss, ["all-linear"], True) == target_linears(oss, ["all-linear"], False)


def test_separate_experts_weigh_what_fused_ones_do() -> None:
    shape = SHAPES["qwen3_moe-plain"]
    separate = target_linears(shape, ["gate_proj", "up_proj", "down_proj"], fused_experts=False)
    fused = [pair for group in shape.groups for pair in layer_linears(group) if pair[0] in group.mlp.expert_linears]
    total = sum(linear.num_weights * copies for linear, copies in separate)
    assert total == sum(linear.num_weights * copies * 5 for linear, copies in fused)


@pytest.mark.parametrize(
    ("case", "targets"),
    [
        ("llama-plain", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        ("gpt2-plain", ("c_attn", "c_proj", "c_fc")),
        ("phi3-plain", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        ("gpt_neox-plain", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
        ("mixtral-num_local_experts", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("bert-plain", ("query", "key", "value", "dense")), ("t5-plain", ("q", "k", "v", "o", "wi", "wo")),
        ("gemma4-text_config-vision_config",
         ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        ("deepseek_v3-plain",
         ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
        ("qwen2_moe-plain", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("gemma4_text-enable_moe_block-num_experts-top_k_experts-moe_intermediate_size",
         ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    ],
)  # fmt: skip
def test_default_targets(case: str, targets: tuple[str, ...]) -> None:
    assert default_targets(SHAPES[case]) == targets


def test_published_adapter_sizes() -> None:
    """Llama-2-7B, r 16: q and v 8.4 M, all linear layers 40.0 M."""
    shape = card("meta-llama/Llama-2-7b-hf")
    assert count_lora_parameters(shape, lora("q_proj", "v_proj", r=16), True) == 8_388_608
    assert count_lora_parameters(shape, lora("all-linear", r=16), True) == 39_976_960


PEFT_CASES = [
    "llama-plain", "qwen2-plain", "mixtral-num_local_experts", "qwen2_moe-plain", "deepseek_v3-plain", "gpt2-plain",
    "gpt_neox-plain", "phi3-plain", "falcon-plain", "bert-plain", "modernbert-plain",
    "t5-feed_forward_proj-tie_word_embeddings",
    "bart-plain", "opt-word_embed_proj_dim-do_layer_norm_before", "gpt_oss-plain", "vit-plain",
    "gemma3-text_config-vision_config-mm_tokens_per_image", "gemma4-text_config-vision_config-audio_config",
    "gemma4_text-enable_moe_block-num_experts-top_k_experts-moe_intermediate_size", "BertForSequenceClassification",
    "LlamaForSequenceClassification", "qwen3_moe-mlp_only_layers", "deepseek_v2-first_k_dense_replace-n_shared_experts",
    "glm4_moe-plain", "BertModel", "LlamaForTokenClassification",
]  # fmt: skip


def adapted(case: str, adapter: Lora) -> Any:
    """Return PEFT's own adapter on transformers' own model, on the meta device."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    keys = {key: value for key, value in copy.deepcopy(CASES[case]).items() if key != "architectures"}
    targets = adapter.target_modules
    shape = SHAPES[case]
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = getattr(transformers, shape.architecture)(transformers.CONFIG_MAPPING[keys.pop("model_type")](**keys))
        config = peft.LoraConfig(
            r=adapter.r,
            target_modules="all-linear" if targets == ("all-linear",) else list(targets),
            use_dora=adapter.use_dora,
            task_type="SEQ_CLS" if shape.architecture.endswith("ForSequenceClassification") else None,
            modules_to_save=[] if shape.architecture.endswith("ForSequenceClassification") else None,
        )
        return peft.get_peft_model(model, config)


@pytest.mark.parametrize("case", PEFT_CASES)
@pytest.mark.parametrize("kind", ["default", "all-linear", "dora"])
def test_adapter_equals_peft(case: str, kind: str) -> None:
    """Same matrices by name, as often, and the same number of trained parameters."""
    shape = SHAPES[case]
    if kind == "default" and shape.model_type == "gemma4":
        pytest.skip("PEFT refuses the clipped matrices of Gemma 4's towers by name")
    targets = default_targets(shape) if kind != "all-linear" else ("all-linear",)
    if shape.model_type == "gemma4":
        targets = ("all-linear",)
    adapter = lora(*targets, r=4, use_dora=kind == "dora")
    model = adapted(case, adapter)
    modules = {id(linear) for linear, _ in target_linears(shape, ["all-linear"], fused_experts=True)}
    ours = Counter[str]()
    for linear, copies in adapter_linears(shape, adapter, fused_experts=True):
        ours[linear.name] += copies if id(linear) in modules else 0
    assert +ours == Counter(adapted_modules(model))
    trained = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    assert count_lora_parameters(shape, adapter, fused_experts=True) == trained


def adapted_modules(model: Any) -> Iterator[str]:
    """Yield the name of every module that has an adapter; adapters on bare parameters are left out."""
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and type(module).__name__ != "ParamWrapper":
            yield path.rsplit(".", 1)[-1]


REROUTED_CASES = [
    "mixtral-num_local_experts", "qwen3_moe-mlp_only_layers", "deepseek_v3-first_k_dense_replace-n_shared_experts",
    "deepseek_v2-plain", "glm4_moe-plain",
]  # fmt: skip


@pytest.mark.parametrize("case", REROUTED_CASES)
@pytest.mark.parametrize("kept", [("down",), ("gate", "up"), ("gate", "up", "down"), ("router",)])
def test_experts_named_as_separate_modules_are_adapted_fused(case: str, kept: tuple[str, ...]) -> None:
    shape = SHAPES[case]
    moe = shape.groups[-1].mlp
    assert isinstance(moe, Moe)
    names = dict(zip(("gate", "up", "down", "router"), (*moe.separate_names, moe.router.name), strict=True))
    adapter = lora("o_proj", *(names[part] for part in kept), r=4)
    trained = sum(p.numel() for name, p in adapted(case, adapter).named_parameters() if "lora_" in name)
    assert count_lora_parameters(shape, adapter, fused_experts=True) == trained


def test_all_linear_on_a_mixture_of_experts_is_large() -> None:
    """The trap: in the newest PEFT `all-linear` is no longer a small adapter."""
    shape = card("Qwen/Qwen3-30B-A3B")
    assert count_lora_parameters(shape, lora(*default_targets(shape), r=16), True) < 15e6
    assert count_lora_parameters(shape, lora("all-linear", r=16), True) > 900e6


def test_adapter_on_an_embedding_equals_peft() -> None:
    adapter = lora("q_proj", "embed_tokens", r=4)
    model = adapted("llama-plain", adapter)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_lora_parameters(SHAPES["llama-plain"], adapter, True) == trained

"""Parameter counts equal transformers' own, for every built-in card and for every odd feature."""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import pytest
from architecture_cases import architecture_cases

from brim.cost.parameters import count_parameters, target_linears
from brim.errors import InvalidConfig, UnsupportedModel
from brim.readers.hf_config import read_config
from brim.spec.model import ModelShape, Moe

CARDS = {row["id"]: row for row in map(json.loads, (files("brim.tables") / "models.jsonl").read_text().splitlines())}
CASES = dict(architecture_cases())


@cache
def build_case(case: str) -> Any:
    """Return transformers' model of a case; kept, for several tests look at it."""
    return build(CASES[case], read_config(CASES[case], name="small").architecture)


def build(config: dict[str, Any], architecture: str) -> Any:
    """Return transformers' own model on the meta device."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    keys = copy.deepcopy(config)
    model_type = {"kimi_k2": "deepseek_v3"}.get(keys.pop("model_type"), config["model_type"])
    for key in ("auto_map", "quantization_config", "architectures"):
        keys.pop(key, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_config = transformers.CONFIG_MAPPING[model_type](**keys)
        with torch.device("meta"):
            model = getattr(transformers, architecture)(model_config)
        model.tie_weights()
    return model


def count(model: Any) -> int:
    """Return the distinct parameters of a module, elements."""
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_card_has_measured_parameters(card: dict[str, Any]) -> None:
    assert count_parameters(read_config(card["config"], name=card["id"])) == card["params"]


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_card_equals_transformers(card: dict[str, Any]) -> None:
    shape = read_config(card["config"], name=card["id"])
    assert count_parameters(shape) == count(build(card["config"], shape.architecture))


@pytest.mark.parametrize("case", CASES)
def test_small_config_equals_transformers(case: str) -> None:
    assert count_parameters(read_config(CASES[case], name="small")) == count(build_case(case))


@pytest.mark.parametrize("case", CASES)
def test_matrices_are_the_modules_of_transformers(case: str) -> None:
    """Every `nn.Linear` (and GPT-2's `Conv1D`) has our name, sizes and bias, as often as it occurs."""
    shape = read_config(CASES[case], name="small")
    targets = ["all-linear", *(linear.name for linear in shape.head)]
    ours = Counter[tuple[str, int, int, bool]]()
    for linear, copies in target_linears(shape, targets, fused_experts=True):
        ours[linear.name, linear.in_features, linear.out_features, linear.bias] += copies
    assert ours == Counter(linear_modules(build_case(case)))


def linear_modules(model: Any) -> Iterator[tuple[str, int, int, bool]]:
    """Yield name, sizes and bias of every matrix module."""
    torch = pytest.importorskip("torch")
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        if isinstance(module, torch.nn.Linear):
            yield name, module.in_features, module.out_features, module.bias is not None
        elif isinstance(module, conv1d):
            yield name, module.nx, module.nf, True


WINDOW_CASES = [case for case, config in CASES.items() if config["model_type"] not in ("vit", "t5", "mt5", "bart")]


@pytest.mark.parametrize("case", WINDOW_CASES)
def test_windows_are_those_of_transformers(case: str) -> None:
    """As many layers slide as in transformers, with the same window."""
    shape = read_config(CASES[case], name="small")
    config = build_case(case).config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or None
    if shape.model_type == "modernbert":
        window = 2 * window + 1
    elif getattr(config, "use_bidirectional_attention", False):
        window = 2 * (window - 1)  # transformers keeps one side of it
    ours = Counter[int | None]()
    for group in shape.groups:
        if group.stack in ("decoder", "encoder"):
            ours[group.attention.sliding_window] += group.count
    assert ours == Counter(window if kind == "sliding_attention" else None for kind in kinds)


SIZES = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
    "intermediate_size": 80,
}  # fmt: skip


def shape_of(**changes: Any) -> ModelShape:
    """Return the shape of a small Llama with changes."""
    return read_config(SIZES | changes, name="small")


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, "fp32"), ({"torch_dtype": "bfloat16"}, "bf16"), ({"dtype": "float16"}, "fp16"),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, "bf16"), ({"torch_dtype": None}, "fp32"),
    ],
)  # fmt: skip
def test_native_dtype(keys: dict[str, Any], dtype: str) -> None:
    assert shape_of(**keys).native_dtype == dtype


def test_natural_class_where_the_config_names_none() -> None:
    assert shape_of().architecture == "LlamaForCausalLM"
    assert shape_of(architectures=[]).architecture == "LlamaForCausalLM"
    bert = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert read_config(bert, name="bert").architecture == "BertForMaskedLM"


def test_quantised_checkpoint_has_the_shape_of_the_plain_one() -> None:
    assert shape_of(quantization_config={"quant_method": "gptq", "bits": 4}) == shape_of()


def test_remote_code_of_a_known_type_is_ignored() -> None:
    assert shape_of(auto_map={"AutoModelForCausalLM": "modeling.Llama"}) == shape_of()


def test_kimi_is_a_deepseek() -> None:
    config = CASES["deepseek_v3-plain"] | {"architectures": ["DeepseekV3ForCausalLM"]}
    kimi = read_config(config | {"model_type": "kimi_k2"}, name="kimi")
    assert kimi.model_type == "kimi_k2"
    assert count_parameters(kimi) == count_parameters(read_config(config, name="kimi"))


def test_output_projection_is_last_and_tied_head_is_listed() -> None:
    shape = shape_of(tie_word_embeddings=True)
    (group,) = shape.groups
    assert group.count == shape.num_hidden_layers == 2
    assert [linear.name for linear in group.attention.linears] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert group.mlp.linears[-1].name == "down_proj"
    assert shape.head[-1].name == "lm_head" and shape.tie_word_embeddings


def test_dense_and_sparse_layers_are_two_groups_in_order() -> None:
    dense, sparse = read_config(CASES["deepseek_v3-plain"], name="small").groups
    assert (dense.count, sparse.count) == (1, 4)
    assert not isinstance(dense.mlp, Moe) and isinstance(sparse.mlp, Moe)
    assert dense.attention.latent and dense.attention.head_dim == 20 and dense.attention.v_head_dim == 10


def test_sequence_of_an_image_is_fixed() -> None:
    assert read_config(CASES["vit-plain"], name="vit").sequence_tokens == 17


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mamba"}, {"model_type": "jamba", "auto_map": {}}, {"architectures": ["LlamaForVideo"]},
        {"architectures": ["MistralForCausalLM"]}, {"torch_dtype": "float8_e4m3fn"}, {"per_layer_config": {"0": {}}},
        {"model_type": "gemma2", "layer_types": ["chunked_attention"] * 2},
        {"model_type": "opt", "layer_norm_elementwise_affine": False},
        {"model_type": "gpt2", "add_cross_attention": True},
        {"model_type": "bert", "add_cross_attention": True},
        {"model_type": "gemma3", "vision_config": {"model_type": "clip_vision_model"}},
        {"model_type": "gemma3", "vision_config": {"vision_use_head": True}},
    ],
)  # fmt: skip
def test_unknown_features_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="formula does not know"):
        shape_of(**changes)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"hidden_size": "4096"}, "hidden_size"), ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 4.5}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"), ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 2**32}, "hidden_size"), ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers"), ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"), ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"hidden_act": 3}, "hidden_act"), ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": [3]}, "architectures"), ({"torch_dtype": 16}, "torch_dtype"),
        ({"model_type": ["llama"]}, "model_type"), ({"model_type": None}, "model_type"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": [1, 2]}, "layer_types"),
        ({"model_type": "qwen3", "head_dim": None}, "head_dim"),
        ({"model_type": "qwen3_moe", "num_local_experts": 100_001}, "num_local_experts"),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 129}, "num_experts_per_tok"),
        ({"model_type": "qwen3_moe", "num_local_experts": 4, "num_experts": 8}, "num_experts"),
        ({"model_type": "deepseek_v2"}, "num_experts_per_tok"),
        ({"model_type": "gemma3", "text_config": [1]}, "text_config"),
        ({"model_type": "gemma4", "text_config": {"hidden_size": "x"}}, r"text_config\.hidden_size"),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        ({"model_type": "vit", "patch_size": 400}, "patch_size"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": 3}, "id2label"),
        ({"hidden_size": 2**30, "vocab_size": 2**31, "num_attention_heads": 1}, "config"),
    ],
)  # fmt: skip
def test_broken_keys_are_named(changes: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidConfig, match=rf"^'small': {path} "):
        shape_of(**changes)


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_required_keys(key: str) -> None:
    with pytest.raises(InvalidConfig, match=f"{key} is missing"):
        read_config({name: value for name, value in SIZES.items() if name != key}, name="small")

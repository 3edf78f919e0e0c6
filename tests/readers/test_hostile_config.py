"""Whatever a config.json holds, `read_config` returns a shape or raises a `BrimError`, quickly."""

from __future__ import annotations

import json
import time
from importlib.resources import files
from typing import Any

import pytest
from architecture_cases import architecture_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.cost.parameters import count_parameters
from brim.errors import BrimError, InvalidConfig
from brim.readers.hf_config import read_config

CASES = [config for _, config in architecture_cases()]
CARDS = [json.loads(line)["config"] for line in (files("brim.tables") / "models.jsonl").read_text().splitlines()]
KEYS = sorted({key for config in (*CASES, *CARDS) for key in config})
COMMON_KEYS = (
    "architectures", "torch_dtype", "layer_types", "head_dim", "sliding_window", "id2label", "num_labels",
    "per_layer_config", "text_config", "vision_config", "audio_config", "tie_word_embeddings", "hidden_act",
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(min_value=-3, max_value=300), st.floats(),
    st.text(max_size=8), st.sampled_from([2**31, 2**31 + 1, 10**400, -(10**400), "4096", "\ud800", "x" * 10_000]),
    st.sampled_from(["full_attention", "sliding_attention", "float16", "LlamaForCausalLM", "BertModel", "all"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(st.sampled_from(KEYS) | st.text(), inner)),
    max_leaves=8,
)


def answer(config: Any, name: str = "hostile") -> None:
    """Read a config; anything but a shape or a `BrimError` fails the test."""
    try:
        shape = read_config(config, name=name)
    except BrimError as error:
        assert len(str(error)) < 1000
    else:
        assert 0 < count_parameters(shape) <= 2**50
        assert hash(shape) == hash(shape)


@given(VALUES)
def test_any_json(config: Any) -> None:
    answer(config)


@settings(max_examples=300)
@given(st.sampled_from(CASES + CARDS), st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4))
def test_mutated_config(config: dict[str, Any], changes: dict[str, Any]) -> None:
    answer(config | changes)


@settings(max_examples=200)
@given(st.sampled_from(CASES), st.data())
def test_mutated_part(config: dict[str, Any], data: st.DataObject) -> None:
    """Values inside nested configs and lists are changed as well."""
    key = data.draw(st.sampled_from(sorted(config)))
    value = config[key]
    if isinstance(value, dict) and value:
        value = value | {data.draw(st.sampled_from(sorted(value))): data.draw(VALUES)}
    elif isinstance(value, list) and value:
        value = [data.draw(VALUES), *value[1:]]
    else:
        value = data.draw(VALUES)
    answer(config | {key: value})


@settings(max_examples=200)
@given(st.sampled_from(CASES + CARDS), st.data())
def test_missing_keys(config: dict[str, Any], data: st.DataObject) -> None:
    dropped = data.draw(st.sets(st.sampled_from(sorted(config)), min_size=1))
    answer({key: value for key, value in config.items() if key not in dropped})


@pytest.mark.parametrize("model_type", sorted({config["model_type"] for config in CASES}))
def test_every_key_of_every_type(model_type: str) -> None:
    """Each key of a small config takes each bad value in turn."""
    config = next(config for config in CASES if config["model_type"] == model_type)
    for key in {*config, *COMMON_KEYS}:
        for bad in (None, True, 0, -1, 1, 2**31, 2**70, 1.5, float("nan"), "", "x", [], [1], [None], {}, {"0": 1}):
            answer(config | {key: bad})


def deep(levels: int) -> list[Any]:
    """Return a list nested so deeply that printing it fails."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("key", ["hidden_size", "layer_types", "architectures", "tie_word_embeddings", "id2label", "x"])
def test_deep_nesting(key: str) -> None:
    config = CASES[0] | {"architectures": ["LlamaForSequenceClassification"]}
    answer(config | {key: deep(100_000)})


def test_two_spellings_that_nest_deeply() -> None:
    gpt2 = next(config for config in CASES if config["model_type"] == "gpt2")
    answer(gpt2 | {"n_embd": deep(100_000), "hidden_size": deep(100_000)})


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention"] * 10_000_000}, {"num_hidden_layers": 10_000},
        {"num_hidden_layers": 10_000, "layer_types": ["full_attention"] * 9_999 + ["x"]},
        {"model_type": "qwen3_moe", "mlp_only_layers": list(range(1_000_000))}, {"model_type": "x" * 10_000_000},
        {"architectures": ["x" * 10_000_000]}, {"hidden_act": "x" * 10_000_000},
        {str(key): key for key in range(10**6)},
        {"id2label": {str(key): "" for key in range(10**6)}, "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "gemma4_text", "num_hidden_layers": 10_000,
         "per_layer_config": {str(i): {} for i in range(10**5)}},
        {"model_type": "gemma4_text", "num_hidden_layers": 10_000,
         "per_layer_config": {str(i): {"head_dim": i + 1} for i in range(10_000)}},
        {"model_type": "modernbert", "num_hidden_layers": 10_000},
    ],
    ids=lambda changes: "-".join(list(changes)[:3]),
)  # fmt: skip
def test_large_configs_are_answered_quickly(changes: dict[str, Any]) -> None:
    start = time.perf_counter()
    answer({"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | changes)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("config", [None, 3, "llama", [], [{}], True, 1.5, deep(100_000)], ids=lambda _: "")
def test_not_an_object(config: Any) -> None:
    with pytest.raises(InvalidConfig, match="must be an object"):
        read_config(config, name="hostile")


def test_hostile_name() -> None:
    answer({}, name="\x1b[31m" + "x" * 10_000)

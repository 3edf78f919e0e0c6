"""Configurations as people write them, read as strategies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.errors import BrimError, InvalidConfig, UnknownName
from brim.readers.trainer_args import read_trainer_args
from brim.spec.strategy import Mesh, Strategy
from brim.tables.dialects import list_dialects


def test_defaults_are_those_of_the_target() -> None:
    assert read_trainer_args({}, target="transformers") == Strategy(micro_batch_size=8, gradient_accumulation_steps=1)
    assert read_trainer_args({}, target="trl") == Strategy(
        micro_batch_size=8, gradient_accumulation_steps=1, activation_checkpointing="full", loss_kernel="chunked"
    )
    old = read_trainer_args({}, target="trl", version="0.13")
    assert (old.activation_checkpointing, old.loss_kernel, old.optimizer_kernel) == ("none", "dense", "foreach")
    unsloth = read_trainer_args({}, target="unsloth")
    assert (unsloth.activation_checkpointing, unsloth.activation_offload) == ("full", True)
    assert (unsloth.layer_kernels, unsloth.allocator) == ("unsloth", "expandable_segments")


def test_a_usual_trl_config() -> None:
    strategy = read_trainer_args(
        {
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 16, "activation_checkpointing": True,
            "model_init_kwargs": {"attn_implementation": "kernels-community/flash-attn2", "dtype": "bfloat16"},
            "optim": "paged_adamw_8bit", "num_processes": 4, "learning_rate": 1e-4,
            "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128, expandable_segments:True",
        },
        target="trl",
    )  # fmt: skip
    assert strategy == Strategy(
        micro_batch_size=2, gradient_accumulation_steps=16, activation_checkpointing="full", attention_kernel="flash",
        loss_kernel="chunked", optimizer_kernel="fused", allocator="expandable_segments", mesh=Mesh(dp_replicate=4),
    )  # fmt: skip


def test_either_name_of_checkpointing_is_read() -> None:
    for word in ("gradient_checkpointing", "activation_checkpointing"):
        words = {word: True, f"{word}_kwargs": {"use_reentrant": False, "offload": True}}
        strategy = read_trainer_args(words, target="transformers")
        assert (strategy.activation_checkpointing, strategy.activation_offload) == ("full", True)


def test_liger_defaults_to_everything() -> None:
    strategy = read_trainer_args({"use_liger_kernel": True}, target="transformers")
    assert (strategy.layer_kernels, strategy.loss_kernel) == ("liger", "fused")
    strategy = read_trainer_args({"use_liger_kernel": True}, target="trl")
    assert (strategy.layer_kernels, strategy.loss_kernel) == ("liger", "chunked")


def test_bare_deepspeed_json() -> None:
    config = {
        "train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}},
    }  # fmt: skip
    strategy = read_trainer_args(config, target="deepspeed")
    assert (strategy.micro_batch_size, strategy.gradient_accumulation_steps) == (2, 4)
    assert (strategy.zero_stage, strategy.offload, strategy.mesh) == (3, "optimizer", Mesh(dp_shard=8))


def test_auto_means_the_keywords() -> None:
    words = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_processes": 2,
        "deepspeed": {
            "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": 2},
        },
    }  # fmt: skip
    strategy = read_trainer_args(words, target="transformers")
    assert (strategy.micro_batch_size, strategy.gradient_accumulation_steps) == (4, 2)
    assert (strategy.zero_stage, strategy.mesh) == (2, Mesh(dp_shard=2))


def test_accelerate_yaml_tells_the_ranks() -> None:
    words = {"per_device_train_batch_size": 1, "accelerate": {"num_processes": 8, "distributed_type": "MULTI_GPU"}}
    assert read_trainer_args(words, target="accelerate").mesh == Mesh(dp_replicate=8)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"per_device_train_batch_size": "4"}, "must be a whole number from 1, is '4'"),
        ({"per_device_train_batch_size": 0}, "must be a whole number from 1, is 0"),
        ({"gradient_accumulation_steps": True}, "must be a whole number"),
        ({"torch_compile": "yes"}, "must be true or false"),
        ({"fsdp": "full_shard"}, "fsdp is not read yet"),
        ({"deepspeed": "ds.json"}, "is a file name"),
        ({"attn_implementation": "flex_attention"}, "is not planned"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "every_n_layers"),
        ({"deepspeed": {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}}, "not a multiple"),
        (
            {"per_device_train_batch_size": 2, "deepspeed": {"train_micro_batch_size_per_gpu": 4}},
            "is 4, but per_device_train_batch_size is 2",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(words: dict, said: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        read_trainer_args(words, target="transformers")
    assert said in str(caught.value)


def test_unknown_names() -> None:
    with pytest.raises(UnknownName, match="did you mean adamw_torch"):
        read_trainer_args({"optim": "adamw_torhc"}, target="trl")
    with pytest.raises(UnknownName, match="did you mean transformers"):
        read_trainer_args({}, target="transformer")


WORDS = sorted(
    {
        "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "attn_implementation", "deepspeed",
        "accelerate", "model_init_kwargs", "use_liger_kernel", "liger_kernel_config", "loss_type", "torch_compile",
        "num_processes", "gradient_checkpointing", "gradient_checkpointing_kwargs", "zero_optimization", "padding_free",
        "use_gradient_checkpointing", "PYTORCH_CUDA_ALLOC_CONF", "train_micro_batch_size_per_gpu",
    }
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=6)
NAMES = st.sampled_from(WORDS)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner))
TARGETS = sorted({row.target for row in list_dialects()})


@given(words=st.dictionaries(NAMES, VALUES), target=st.sampled_from(TARGETS))
def test_any_mapping_is_read_or_refused_in_one_line(words: dict, target: str) -> None:
    try:
        strategy = read_trainer_args(words, target=target)
    except BrimError as error:
        assert "\n" not in str(error)
    else:
        assert strategy.micro_batch_size >= 1

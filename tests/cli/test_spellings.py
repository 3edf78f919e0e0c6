"""Hugging Face's spellings mean the same as brim's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from brim.cli.options import FLAGS, read_words
from brim.cli.spellings import spell_as_brim
from brim.errors import InvalidInput

Run = Callable[..., Any]


@pytest.mark.parametrize(("words", "read"), [
    (["--bf16", "True", "x"], ["--bf16", "x"]),
    (["--load_in_4bit", "true"], ["--load-in-4bit"]),
    (["--packing=False"], ["--no-packing"]),
    (["--gradient_checkpointing=TRUE"], ["--gradient-checkpointing"]),
    (["--gradient-checkpointing", "false"], ["--no-gradient-checkpointing"]),
    (["--dataset", "True"], ["--dataset", "True"]),
    (["--packing", "7B"], ["--packing", "7B"]),
    (["True"], ["True"]),
    (["--seq-len=4", "-h"], ["--seq-len=4", "-h"]),
    (["--json", "false"], ["--json", "false"]),
    ([], []),
])  # fmt: skip
def test_hf_booleans(words: list[str], read: list[str]) -> None:
    assert read_words(words) == read


@pytest.mark.parametrize(("said", "job"), [
    ({"load_in_4bit": True}, {"method": "qlora"}),
    ({"load_in_4bit": False}, {}),
    ({"load_in_4bit": True, "method": "lora"}, {"method": "qlora"}),
    ({"load_in_8bit": True}, {"method": "qlora", "quantization": "int8"}),
    ({"bf16": True}, {"dtype": "bf16"}),
    ({"fp16": True, "bf16": False}, {"dtype": "fp16"}),
    ({"gradient_checkpointing": True}, {"activation_checkpointing": "full"}),
    ({"gradient_checkpointing": False}, {"activation_checkpointing": "none"}),
    ({"attention_kernel": "flash_attention_2"}, {"attention_kernel": "flash"}),
    ({"dtype": "bfloat16", "bf16": True}, {"dtype": "bf16"}),
    ({"packing": False, "seq_len": None}, {"packing": False}),
])  # fmt: skip
def test_stand_ins(said: dict[str, Any], job: dict[str, Any]) -> None:
    assert spell_as_brim(said) == job


@pytest.mark.parametrize("said", [
    {"load_in_4bit": True, "method": "full"}, {"bf16": True, "fp16": True}, {"bf16": True, "dtype": "float16"},
    {"gradient_checkpointing": True, "activation_checkpointing": "none"},
    {"load_in_8bit": True, "quantization": "nf4"},
])  # fmt: skip
def test_contradictions_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="means --"):
        spell_as_brim(said)


@pytest.mark.parametrize("words", [
    ["--per-device-train-batch-size", "2", "--gradient_accumulation_steps", "8"],
    ["--per_device_train_batch_size=2", "--global-batch-size", "16"],
    ["--micro_batch_size", "2", "--effective-batch-size", "16", "--optim", "adamw_torch_fused"],
    ["--micro-batch-size", "2", "--effective-batch-size", "16", "--max-length", "2048"],
    ["--micro-batch-size", "2", "--effective-batch-size", "16", "--cutoff_len", "2,048", "--num_train_epochs", "1.0"],
])  # fmt: skip
def test_both_spellings_give_the_same_strategy(brim: Run, job: tuple[str, ...], words: list[str]) -> None:
    strategy = brim("plan", *job, *words, "--json").json["strategy"]
    assert (strategy["micro_batch_size"], strategy["gradient_accumulation_steps"]) == (2, 8)


def test_loading_in_4bit_is_qlora(brim: Run) -> None:
    words = ("plan", "--model_name_or_path", "8B", "--load_in_4bit", "True", "--gpu", "rtx-4090", "--json")
    assert brim(*words).json["workload"]["recipe"]["method"] == "qlora"


def test_what_the_user_fixes_stays_fixed(brim: Run, job: tuple[str, ...]) -> None:
    words = ("--gradient-checkpointing", "--attn-implementation", "sdpa", "--micro-batch-size", "1")
    strategy = brim("plan", *job, *words, "--json").json["strategy"]
    assert strategy["activation_checkpointing"] == "full"
    assert strategy["attention_kernel"] == "sdpa" and strategy["micro_batch_size"] == 1


def test_no_two_flags_share_a_name() -> None:
    names = [name for flag in FLAGS for name in (flag.name.replace("_", "-"), *flag.aliases)]
    assert len(names) == len(set(names))

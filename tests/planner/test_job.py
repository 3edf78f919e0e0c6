from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_toys import make_job

from brim.errors import BrimError, InvalidInput
from brim.planner.options import read_options
from brim.spec.recipe import Recipe


def recipe(**options: Any) -> Recipe:
    return make_job(**options).workload.recipe


def test_defaults_are_said() -> None:
    assert make_job(gpu="rtx-4090").assumptions == (
        "trainer trl",
        "task instruction-tuning",
        "method lora (adapters on a 16-bit base)",
        "dtype bf16",
        "optimizer adamw (fused kernel)",
        "LoRA rank 16",
        "LoRA alpha 32, twice the rank",
        "LoRA on every attention and feed-forward matrix: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
        "down_proj",
        "sequences of 2,048 tokens",
        "effective batch 32 sequences: low end of the optimal range of instruction-tuning, 32-64 sequences",
        "1 epoch",
    )


def test_what_is_said_is_not_assumed() -> None:
    job = make_job(
        method="full", trainer="plain", task="chat", dtype="fp32", optimizer="sgd", seq_len=512,
        effective_batch_size=64, epochs=2,
    )  # fmt: skip
    assert job.assumptions == ()


def test_the_length_is_no_longer_than_the_positions() -> None:
    job = make_job("gpt2")
    assert job.workload.data.seq_len == 1024
    assert "sequences of 1,024 tokens, all the positions openai-community/gpt2 has" in job.assumptions


def test_old_cards_get_fp16_and_it_is_said() -> None:
    job = make_job(gpu="t4")
    assert job.workload.recipe.compute_dtype == "fp16"
    assert "dtype fp16: t4 has compute capability 7.5, bf16 needs 8.0" in job.assumptions
    full = recipe(gpu="t4", method="full")
    assert (full.weight_dtype, full.compute_dtype, full.autocast) == ("fp32", "fp16", True)


def test_the_trainer_decides_adapter_dtype_and_upcasts() -> None:
    trl, transformers = recipe(method="qlora"), recipe(method="qlora", trainer="transformers")
    assert trl.lora is not None and trl.lora.dtype == "bf16"
    assert transformers.lora is not None and transformers.lora.dtype == "fp32"
    assert trl.quantization is not None and not trl.quantization.upcast_rest
    assert transformers.quantization is not None and transformers.quantization.upcast_rest
    assert trl.quantization.kind == "nf4" and trl.quantization.double_quant
    assert recipe(trainer="plain").engine.logits_alive_in_backward and not recipe(trainer="plain").autocast


def test_an_fp16_run_has_fp32_adapters() -> None:
    lora = recipe(method="qlora", gpu="t4").lora
    assert lora is not None and lora.dtype == "fp32"


def test_storage_implies_qlora() -> None:
    job = make_job(quantization="fp4", double_quant=False)
    assert job.workload.recipe.method == "qlora" and job.workload.recipe.quantization is not None
    assert not job.workload.recipe.quantization.double_quant
    assert "method qlora, since the base is quantised" in job.assumptions


@pytest.mark.parametrize(
    ("said", "optimizer", "kernel"),
    [
        ("adamw", "adamw", None), ("adamw_torch", "adamw", "foreach"), ("adamw_torch_fused", "adamw", "fused"),
        ("paged_adamw_8bit", "paged-adamw-8bit", "fused"), ("adamw_8bit", "adamw-8bit", None),
        ("adamw_bnb_8bit", "adamw-8bit", "fused"), ("sgd", "sgd", None), ("adafactor", "adafactor", None),
    ],
)  # fmt: skip
def test_hf_optimizer_names_carry_their_kernel(said: str, optimizer: str, kernel: str | None) -> None:
    job = make_job(optimizer=said)
    assert job.workload.recipe.optimizer == optimizer
    assert job.fixed.get("optimizer_kernel") == kernel


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"effective_batch_size": 0}, "effective_batch_size must be a whole number from 1 to 16,777,216, not 0"),
        ({"seq_len": 2**30}, "seq_len must be a whole number from 1 to 16,777,216, not 1073741824"),
        ({"micro_batch_size": 2.5}, "micro_batch_size must be a whole number from 1 to 16,777,216, not 2.5"),
        ({"micro_batch_size": True}, "micro_batch_size must be a whole number from 1 to 16,777,216, not 'True'"),
        ({"lora_r": 10**30}, "lora_r must be a whole number from 1 to 65,536, not a number of more than 24 digits"),
        ({"epochs": float("nan")}, "epochs must be a number above 0 and at most 10,000, not nan"),
        ({"epochs": -1}, "epochs must be a number above 0 and at most 10,000, not -1"),
        ({"method": "qlorra"}, "unknown method 'qlorra'; did you mean qlora or lora?"),
        ({"effective_batchsize": 3}, "unknown option 'effective_batchsize'; did you mean effective_batch_size"),
        ({"trainer": "trll"}, "unknown trainer 'trll'; did you mean trl?"),
        ({"task": "chatt"}, "unknown task 'chatt'; did you mean chat?"),
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm'; did you mean adamw"),
        ({"packing": "yes"}, "packing must be true or false, not 'yes'"),
        ({"dataset": ""}, "dataset must be a name, not ''"),
        ({"dataset": "a\nb"}, "dataset must be a name, not 'a?b'"),
        ({"lora_targets": ","}, "lora_targets must be names such as q_proj,v_proj, not ','"),
        ({"lora_targets": "q_pro"}, "unknown LoRA target of meta-llama/Llama-2-7b-hf 'q_pro'; did you mean q_proj"),
        ({"method": "full", "lora_r": 8}, "lora_r needs method lora or qlora, not full"),
        ({"method": "full", "quantization": "nf4"},
         "quantization freezes the base: it needs method qlora, not full"),
        ({"quantization": "int8", "double_quant": True},
         "double_quant quantises the scales of 4-bit weights; int8 has none"),
        ({"optimizer": "adamw_torch", "optimizer_kernel": "fused"},
         "optimizer adamw_torch is the foreach kernel, but optimizer_kernel fused was asked for; leave one of them "
         "out"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        make_job(**options)
    assert str(refused.value).startswith(text) and "\n" not in str(refused.value)


def test_vision_models_have_one_length() -> None:
    job = make_job("google/vit-base-patch16-224", method="full")
    assert job.workload.data.seq_len == 197
    with pytest.raises(InvalidInput, match="always reads 197 tokens, not 512; leave seq_len out"):
        make_job("google/vit-base-patch16-224", method="full", seq_len=512)


WILD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.lists(st.text(max_size=3))


@settings(max_examples=300, deadline=None)
@given(
    values=st.dictionaries(
        st.sampled_from(
            ["method", "num_nodes", "trainer", "seq_len", "task", "effective_batch_size", "effective_batch_tokens",
             "dataset", "dataset_size", "epochs", "lora_r", "lora_alpha", "lora_targets", "optimizer", "dtype", "by",
             "micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "attention_kernel",
             "optimizer_kernel", "loss_kernel", "packing", "quantization", "double_quant", "refresh"]
        ),
        WILD, max_size=4,
    )
)  # fmt: skip
def test_no_value_gives_a_traceback(values: dict[str, Any]) -> None:
    try:
        read_options(values)
        make_job(**values)
    except BrimError as error:
        assert str(error) and "\n" not in str(error)

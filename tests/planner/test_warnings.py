from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from planner_toys import GIB, make_job, toy_answerer

from brim.planner.answerer import answer_by_rule
from brim.planner.plan import plan_workload

ROOMY = toy_answerer(base_bytes=GIB, budget_bytes=2000 * GIB)


def warnings(**options: Any) -> dict[str, str]:
    job = make_job(**options)
    return {warning.code: warning.text for warning in plan_workload(job.workload, job.fixed, ROOMY).warnings}


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"effective_batch_size": 4}, "batch_below_range",
         "effective batch 4 is below 8, the least useful for instruction-tuning: the gradient is mostly noise; "
         "32-64 is the usual range"),
        ({"effective_batch_size": 256}, "batch_above_range",
         "effective batch 256 is above 128, the most useful for instruction-tuning: the same data gives fewer steps "
         "and learns less; 32-64 is the usual range"),
        ({"effective_batch_size": 16}, "batch_outside_optimum",
         "effective batch 16 is outside 32-64, the optimal range for instruction-tuning"),
        ({"dataset_size": 1600, "epochs": 1.0}, "few_steps",
         "only 50 optimizer steps: effective batch 32 is large for 1,600 sequences and 1 epoch; a smaller effective "
         "batch gives more steps"),
        ({"dataset_size": 10_000}, "partial_window",
         "the last step of each epoch averages over 16 sequences instead of 32"),
        ({"seq_len": 8192}, "beyond_positions",
         "sequences of 8,192 tokens are longer than the 4,096 positions meta-llama/Llama-2-7b-hf was built for"),
        ({"method": "full"}, "optimizer_state",
         "2.50 GiB of the 5.29 GiB peak are optimizer states (adamw); they appear after the first optimizer step"),
        ({"gpu": "t4"}, "loss_scaling",
         "t4 has no bf16: gradients in fp16 underflow without loss scaling (on with fp16=True in the HF Trainer)"),
        ({"model": "mistralai/Mixtral-8x7B-v0.1", "method": "qlora"}, "experts_unquantised",
         "transformers 5 keeps all experts of a layer in one parameter, which bitsandbytes does not quantise: "
         "84.00 GiB of mistralai/Mixtral-8x7B-v0.1 are not in nf4"),
        ({"effective_batch_tokens": 65_537}, "rounded_tokens",
         "effective batch: 65,537 tokens given by the user do not split exactly; nearest: 32 sequences of 2,048 tokens "
         "= 65,536 tokens"),
        ({"model": "t5-small", "dtype": "fp16"}, "fp16_overflow",
         "activations of t5 models overflow in fp16 and give NaN losses: use --dtype fp32, or a card with bf16 "
         "(compute capability 8.0)"),
        ({"gpu": "mi300x", "method": "qlora"}, "bitsandbytes_on_amd",
         "mi300x needs the ROCm build of bitsandbytes for quantised weights and 8-bit or paged optimizers"),
        ({"packing": True, "dataset_size": 5000}, "packed_steps",
         "packing joins the 5,000 sequences into fewer, longer ones; how many is known only after tokenising, so "
         "steps per epoch are not counted"),
    ],
)  # fmt: skip
def test_a_warning_has_the_numbers(options: dict[str, Any], code: str, text: str) -> None:
    found = warnings(**options)
    if code == "optimizer_state":
        assert found[code].endswith("are optimizer states (adamw); they appear after the first optimizer step")
    else:
        assert found[code] == text


@pytest.mark.parametrize(
    ("options", "overflows"),
    [({"model": "google/gemma-2-2b", "dtype": "fp16"}, True), ({"model": "google/gemma-2-2b"}, False),
     ({"dtype": "fp16"}, False)],
)  # fmt: skip
def test_overflow_is_named_by_family_and_dtype(options: dict[str, Any], overflows: bool) -> None:
    assert ("fp16_overflow" in warnings(**options)) is overflows


def test_exact_tokens_are_no_warning() -> None:
    assert "rounded_tokens" not in warnings(effective_batch_tokens=65_536)


def test_fragmentation_is_named_when_reserved_does_not_fit() -> None:
    job = make_job()
    tight = replace(ROOMY, estimate=lambda *given: replace(
        ROOMY.estimate(*given), peak_reserved_bytes=25 * GIB, device_bytes=26 * GIB
    ))  # fmt: skip
    (warning,) = (
        warning
        for warning in plan_workload(job.workload, job.fixed, tight).warnings
        if warning.code == "fragmentation"
    )
    assert warning.text == (
        "the allocator may hold 25.00 GiB and the process 26.00 GiB of 24.00 GiB: set "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True against fragmentation"
    )


def test_the_rule_says_what_it_leaves_out() -> None:
    job = make_job(gpu="80GB:8", method="lora")
    plan = plan_workload(job.workload, job.fixed, answer_by_rule())
    codes = {warning.code: warning.text for warning in plan.warnings}
    assert codes["rule_of_thumb"] == (
        "the rule of thumb leaves out optimizer states, gradients and logits; by formula counts them. It spreads the "
        "weights over 8 devices, while every rank of this plan holds all of them"
    )


def test_pure_bf16_is_named_only_where_it_is() -> None:
    assert "pure_bf16" in warnings(method="full")
    assert "pure_bf16" not in warnings(method="full", dtype="fp32")
    assert "pure_bf16" not in warnings(method="lora")


def test_padding_is_named_unless_packed() -> None:
    assert "padding" in warnings() and "padding" not in warnings(packing=True)


def test_a_good_job_warns_of_padding_only() -> None:
    assert list(warnings(dataset_size=32_000)) == ["padding"]


def test_accumulation_is_warned_of_where_it_was_measured_to_be_off() -> None:
    found = warnings(model="t5-small", trainer="transformers", micro_batch_size=4)
    assert "not divided by the accumulation steps" in found["accumulation_not_exact"]
    assert "brim.guard" in found["accumulation_not_exact"]
    assert "accumulation_not_exact" not in warnings(trainer="transformers", micro_batch_size=4)  # Llama
    assert "accumulation_not_exact" not in warnings(model="t5-small", trainer="accelerate", micro_batch_size=4)
    routed = warnings(model="mistralai/Mixtral-8x7B-v0.1", trainer="transformers", micro_batch_size=4)
    assert "MixtralForCausalLM with router losses on" in routed["accumulation_not_exact"]

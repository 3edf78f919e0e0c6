from __future__ import annotations

from typing import Any

import pytest
from planner_toys import make_job

from brim.errors import InvalidInput
from brim.spec.recipe import Recipe


def recipe(**options: Any) -> Recipe:
    return make_job(**options).workload.recipe


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
    plain, accelerate = recipe(trainer="plain"), recipe(trainer="accelerate")
    assert not plain.engine.logits_alive_in_backward and not plain.autocast
    assert accelerate.engine.logits_alive_in_backward and accelerate.autocast


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


def test_pairs_are_compared_with_a_reference() -> None:
    full, lora = recipe(trainer="trl-dpo", method="full").preference, recipe(trainer="dpo").preference
    assert full is not None and full.reference == "model"
    assert lora is not None and lora.reference == "adapter"
    ahead = recipe(trainer="DPOTrainer", precompute_ref_log_probs=True).preference
    assert ahead is not None and ahead.reference == "precomputed"
    assert recipe(trainer="trl").preference is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precompute_ref_log_probs": True}, "needs trainer trl-dpo, not trl"),
        ({"trainer": "trl-dpo", "packing": True}, "does not pack pairs"),
        ({"trainer": "trl-dpo", "target": "trl"}, "trl cannot express training on pairs"),
    ],
)
def test_what_pairs_exclude_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        recipe(**options)


def test_a_run_may_go_on_from_a_checkpoint() -> None:
    assert recipe(resume=True).engine.resumes and not recipe().engine.resumes


def test_virtual_tokens_take_no_adapter() -> None:
    prompts = recipe(method="prompt-tuning")
    assert (prompts.lora, prompts.num_virtual_tokens) == (None, 20)

"""DPO traced against TRL's own trainer: one process, one model, bytes metered by torch.profiler."""

from __future__ import annotations

import gc
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peft
import torch
from datasets import Dataset
from real_steps import BATCH, LENGTH, Case
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from brim.probes.model import give_tensors, prepare_model
from brim.probes.preferences import follow_reference, prepare_reference
from brim.probes.step import plan_step, run_steps
from brim.probes.trace import trace
from brim.probes.tracker import StorageTracker
from brim.probes.values import KnownValues
from brim.spec.recipe import Engine, Preference

STEPS = 3


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def pair_case(reference: str, method: str, **knobs: object) -> Case:
    engine = Engine(name="trl-dpo", evaluates=False)
    case = Case("llama", engine=engine, method=method, **{"loss_kernel": "chunked", "optimizer_kernel": "fused", **knobs})
    recipe = replace(case.workload.recipe, preference=Preference(reference=reference))  # type: ignore[arg-type]
    case.workload = replace(case.workload, recipe=recipe)
    return case


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def measure_peak(case: Case, folder: Path) -> int:
    """Return the most bytes TRL's trainer takes above what its models take."""
    answer = " ".join("b" * (LENGTH - 2))
    rows = [{"prompt": "a ", "chosen": answer, "rejected": answer}] * (BATCH * STEPS)
    recipe, strategy = case.workload.recipe, case.strategy
    config = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=BATCH, bf16=False, use_cpu=True, max_steps=STEPS,
        gradient_checkpointing=strategy.activation_checkpointing == "full", optim="adamw_torch_fused",
        gradient_accumulation_steps=1, report_to=[], save_strategy="no", max_length=LENGTH, logging_steps=1,
        precompute_ref_log_probs=recipe.preference.reference == "precomputed",
    )  # fmt: skip
    lora = None
    if recipe.lora is not None:
        lora = peft.LoraConfig(
            r=recipe.lora.r, lora_alpha=recipe.lora.alpha, target_modules=list(recipe.lora.target_modules)
        )
    trainer = DPOTrainer(
        model=case.build(), ref_model=case.build() if recipe.preference.reference == "model" else None, args=config,
        train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer(), peft_config=lora,
    )  # fmt: skip
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape == (2 * BATCH, LENGTH)
    gc.collect()  # what an earlier profile saw allocated would be seen freed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        trainer.train()
    live = highest = 0
    for event in sorted(session.profiler.kineto_results.events(), key=lambda one: one.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest


def trace_peak(case: Case) -> int:
    """Return the same of the step on fake tensors, with the CPU's kernels and without rounding."""
    recipe = case.workload.recipe
    model = prepare_model(case.build, recipe, case.strategy)
    reference = prepare_reference(case.build, recipe, case.strategy, shorten=None)
    tracker, known = StorageTracker(scalar=1.0, kind=FakeTensor, block_bytes=1), KnownValues()
    tracker.read_scalar = known.read_scalar
    with FakeTensorMode(), known:
        give_tensors(model)
        tracker.follow((*model.parameters(), *model.buffers()), "parameter")
        follow_reference(reference, tracker)
        given = sum(event.num_bytes for event in tracker.events)
        step = plan_step(case.workload, case.strategy, model, case.make_inputs, tracker, reference)
        with tracker:
            run_steps(step)
    live = highest = 0
    for event in tracker.events:
        live += event.num_bytes
        highest = max(highest, live)
    return highest - given


CASES = {
    "adapter": lambda: pair_case("adapter", "lora"),
}
SLOW = {
    "model": lambda: pair_case("model", "full"),
    "model, checkpointed": lambda: pair_case("model", "full", activation_checkpointing="full"),
    "precomputed": lambda: pair_case("precomputed", "full"),
    "adapter, checkpointed": lambda: pair_case("adapter", "lora", activation_checkpointing="full"),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_peak_is_that_of_trls_trainer(name: str, tmp_path: Path) -> None:
    case = (CASES | SLOW)[name]()
    real, traced = measure_peak(case, tmp_path), trace_peak(case)
    assert traced == pytest.approx(real, rel=0.01), (name, real, traced)

"""Loops traced against the trainers themselves, metered by torch.profiler."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch
from meter import fill, measure_peak, trace_peak
from transformers import Trainer, TrainingArguments

from brim.probes.loops import ACCELERATE, PLAIN, PREFERENCES, TRAINER, LossScaler, find_loop, takes_label_count
from brim.spec.recipe import Engine, Preference, Recipe
from real_steps import BATCH, LENGTH, Case


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def train(case: Case, folder: Path) -> Callable[[], Any]:
    """Return the HF Trainer's loop of two optimizer steps and an evaluation."""
    strategy = case.strategy
    row = {name: torch.zeros(LENGTH, dtype=torch.long) for name in ("input_ids", "labels")}
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, max_steps=2,
        gradient_accumulation_steps=strategy.gradient_accumulation_steps, use_cpu=True, optim="adamw_torch_fused",
        report_to=[], save_strategy="no", eval_strategy="steps", eval_steps=2, disable_tqdm=True,
        gradient_checkpointing=strategy.activation_checkpointing == "full",
    )  # fmt: skip
    rows = [row] * (2 * BATCH * strategy.gradient_accumulation_steps)
    trainer = Trainer(model=fill(case.build()), args=args, train_dataset=rows, eval_dataset=rows[:BATCH])
    return trainer.train


def run_by_accelerate(case: Case) -> Callable[[], Any]:
    """Return the loop that brim exports for Accelerate, which holds the output until the backward pass ends."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    row = {name: torch.zeros(LENGTH, dtype=torch.long) for name in ("input_ids", "labels")}
    loader = torch.utils.data.DataLoader([row] * (2 * BATCH), batch_size=BATCH)
    model = fill(case.build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def step(batch: Any) -> None:
        outputs = model(**batch)
        accelerator.backward(outputs.loss)
        optimizer.step()
        optimizer.zero_grad()

    def run() -> None:
        for batch in loader:
            step(batch)

    return run


CASES = {"transformers": {}}
SLOW = {
    "transformers, accumulated": {"gradient_accumulation_steps": 2},
    "transformers, checkpointed": {"activation_checkpointing": "full"},
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_peak_is_that_of_the_trainer(name: str, tmp_path: Path) -> None:
    case = Case("llama", optimizer_kernel="fused", **(CASES | SLOW)[name])
    real, traced = measure_peak(train(case, tmp_path)), trace_peak(case)
    assert traced == pytest.approx(real, rel=0.002), (real, traced)


@pytest.mark.slow
def test_the_peak_is_that_of_an_accelerate_loop() -> None:
    engine = Engine(name="accelerate", logits_alive_in_backward=True, evaluates=False)
    case = Case("llama", engine=engine, optimizer_kernel="fused")
    real, traced = measure_peak(run_by_accelerate(case)), trace_peak(case)
    assert traced == pytest.approx(real, rel=0.002), (real, traced)


@pytest.mark.parametrize(
    ("engine", "loop"),
    [("plain PyTorch loop", PLAIN), ("accelerate", ACCELERATE), ("transformers", TRAINER), ("trl", TRAINER),
     ("unsloth", TRAINER), ("axolotl", TRAINER), ("torchtune", PLAIN)],
)  # fmt: skip
def test_loops_are_known_by_the_trainers_name(engine: str, loop: object) -> None:
    recipe = Recipe(method="full", engine=Engine(name=engine))
    assert find_loop(recipe) is loop
    pairs = replace(recipe, preference=Preference())
    assert find_loop(pairs) is (ACCELERATE if engine == "accelerate" else PREFERENCES)


def test_the_trainer_itself_says_who_takes_a_count(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    for family in ("llama", "gpt2", "bert"):
        model = Case(family).build()
        assert takes_label_count(model) is Trainer(model=model, args=args).model_accepts_loss_kwargs


def test_the_scaler_never_skips_a_step() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), LossScaler("cpu")
    torch.autograd.backward(scaler.scale(weight.sum()) * float("inf"))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(weight.detach(), torch.ones(4))

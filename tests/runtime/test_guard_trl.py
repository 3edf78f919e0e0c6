"""The guard over TRL's trainers: packed and padded SFT, DPO, reward models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, Qwen3MoeConfig
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import brim
from brim.checks.gradients import CaptureOptimizer
from brim.checks.subjects import build_model, make_tokenizer
from brim.errors import InseparableLoss

WINDOW, ROWS = 8, 19


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    torch.set_num_threads(1)


def say(generator: torch.Generator, shortest: int, longest: int) -> str:
    length = int(torch.randint(shortest, longest, (), generator=generator))
    return " ".join(f"w{int(token)}" for token in torch.randint(3, 96, (length,), generator=generator))


def make_rows(*columns: str) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_list([
        {"prompt": say(generator, 2, 10), **{column: say(generator, 2, 25) for column in columns}} for _ in range(ROWS)
    ])  # fmt: skip


def make_trainer(kind: str, size: int, tmp_path: Path, *, moe: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig() if moe else LlamaConfig()
    model = build_model(config.to_dict(), "Qwen3MoeForCausalLM" if moe else "LlamaForCausalLM")
    if kind == "reward":
        small = copy.deepcopy(model.config)
        small.num_labels = 1
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(small)
    settings, trainer, columns = {
        "sft": (SFTConfig, SFTTrainer, ("completion",)), "dpo": (DPOConfig, DPOTrainer, ("chosen", "rejected")),
        "reward": (RewardConfig, RewardTrainer, ("chosen", "rejected")),
    }[kind]  # fmt: skip
    arguments = settings(
        str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=WINDOW // size, max_steps=3,
        report_to=[], save_strategy="no", max_grad_norm=1e9, disable_tqdm=True, use_cpu=True, bf16=False,
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    stepper = CaptureOptimizer(model.parameters())
    reference = {"ref_model": copy.deepcopy(model)} if kind == "dpo" else {}
    made = trainer(
        model=model, args=arguments, train_dataset=make_rows(*columns), processing_class=make_tokenizer(),
        optimizers=(stepper, torch.optim.lr_scheduler.ConstantLR(stepper, factor=1.0)), **reference,
    )  # fmt: skip
    made._get_train_sampler = lambda *_, **__: torch.utils.data.SequentialSampler(made.train_dataset)
    return made


def captured(trainer: Any) -> list[Tensor]:
    stepper = trainer.optimizer
    trainer.train()
    return stepper.captured


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((one - other).norm() / other.norm()) for one, other in zip(found, truth, strict=True)]


@pytest.mark.parametrize(("kind", "options"), [
    ("sft", {}), ("sft", {"padding_free": True, "max_length": None}), ("sft", {"label_smoothing_factor": 0.1}),
    ("dpo", {}), ("reward", {}),
])  # fmt: skip
def test_every_split_is_the_big_batch(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    truth = captured(brim.guard(make_trainer(kind, 8, tmp_path, **options)))
    for size in (2, 1):
        found = captured(brim.guard(make_trainer(kind, size, tmp_path, **options)))
        assert errors(found, truth) == pytest.approx([0] * 3, abs=1e-5)


def test_the_uneven_tail_of_preferences_is_why(tmp_path: Path) -> None:
    truth, stock = captured(make_trainer("dpo", 8, tmp_path)), captured(make_trainer("dpo", 2, tmp_path))
    assert errors(stock, truth)[2] > 0.1


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_router_losses_added_by_the_trainer_are_found(tmp_path: Path, kind: str) -> None:
    trainer = brim.guard(make_trainer(kind, 4, tmp_path, moe=True, router_aux_loss_coef=0.05))
    trainer.train()
    assert trainer._exact_form.auxiliary == (("aux_loss", 0.05),)


def test_measuring_leaves_the_metrics_alone(tmp_path: Path) -> None:
    counted = []
    for prepare in (lambda trainer: trainer, brim.guard):
        trainer = prepare(make_trainer("sft", 4, tmp_path, logging_steps=1))
        trainer.train()
        counted.append([entry.get("num_tokens") for entry in trainer.state.log_history if "loss" in entry])
    assert counted[0] == counted[1]


def test_a_sum_of_means_over_pairs_and_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InseparableLoss, match="keep the micro-batch at the whole batch"):
        brim.guard(make_trainer("dpo", 2, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0])).train()


def test_a_baseline_over_the_micro_batch_is_refused(tmp_path: Path) -> None:
    """KTO's KL is estimated in each micro-batch and cut off at 0, where it cannot be seen."""
    rows = make_rows("completion").map(lambda row, index: {"label": bool(index % 2)}, with_indices=True)
    model = build_model(LlamaConfig().to_dict(), "LlamaForCausalLM")
    arguments = KTOConfig(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1, report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = KTOTrainer(
        model=model, ref_model=copy.deepcopy(model), args=arguments, train_dataset=rows,
        processing_class=make_tokenizer(),
    )  # fmt: skip
    with pytest.raises(InseparableLoss, match="a KL baseline"):
        brim.guard(trainer).train()

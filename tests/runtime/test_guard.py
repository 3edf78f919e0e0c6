"""The guard over real trainers: every split gives the big batch's gradient, and stock ones show why it is needed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig, T5Config, Trainer, TrainingArguments

import brim
from brim.checks.gradients import CaptureOptimizer
from brim.checks.sequences import collate, make_rows
from brim.checks.subjects import build_model
from brim.errors import InseparableLoss, InvalidInput

WINDOW, ROWS = 8, 19
CONFIGS: dict[str, Any] = {
    "LlamaForCausalLM": LlamaConfig(),
    "T5ForConditionalGeneration": T5Config(),
    "MixtralForCausalLM": MixtralConfig(output_router_logits=True, router_aux_loss_coef=0.1),
    "GPT2LMHeadModel": transformers.GPT2Config(),
}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(copy.deepcopy(self.rows))


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_trainer(
    tmp_path: Path, size: int, *, architecture: str = "LlamaForCausalLM", kind: type[Trainer] = InOrder,
    streams: bool = False, optimizer: Any = None, **options: Any,
) -> Any:  # fmt: skip
    model = build_model(CONFIGS[architecture].to_dict(), architecture)
    rows = make_rows(architecture, model.config, ROWS)
    said = {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": WINDOW // size, "max_steps": 3,
        "report_to": [], "save_strategy": "no", "max_grad_norm": 1e9, "disable_tqdm": True, "use_cpu": True,
        "logging_steps": 1, "remove_unused_columns": False, **options,
    }  # fmt: skip
    stepper = (optimizer or CaptureOptimizer)(model.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(stepper, factor=1.0)
    return kind(
        model, TrainingArguments(str(tmp_path), **said), train_dataset=Stream(rows) if streams else rows,
        data_collator=collate, eval_dataset=rows, optimizers=(stepper, schedule),
    )  # fmt: skip


def captured(trainer: Any) -> list[Tensor]:
    stepper = trainer.optimizer
    trainer.train()
    return getattr(stepper, "optimizer", stepper).captured


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "T5ForConditionalGeneration", "GPT2LMHeadModel"])
def test_every_split_and_tail_is_the_big_batch(tmp_path: Path, architecture: str, streams: bool) -> None:
    make = {"architecture": architecture, "streams": streams, "max_steps": 6}
    truth = captured(brim.guard(make_trainer(tmp_path, 8, **make)))
    assert len(truth) == 6  # two epochs of two whole windows and a partial one
    assert error(truth[3], truth[0]) < 1e-6
    for size in (4, 2, 1):
        found = captured(brim.guard(make_trainer(tmp_path, size, **make)))
        assert [error(one, other) for one, other in zip(found, truth, strict=True)] == pytest.approx([0] * 6, abs=1e-5)


def test_the_stock_loop_is_off_where_the_guard_is_not(tmp_path: Path) -> None:
    truth = captured(brim.guard(make_trainer(tmp_path, 8, architecture="T5ForConditionalGeneration")))
    stock = captured(make_trainer(tmp_path, 1, architecture="T5ForConditionalGeneration"))
    assert error(stock[0], truth[0]) > 1
    tail = captured(make_trainer(tmp_path, 2, streams=True))
    assert error(tail[2], captured(brim.guard(make_trainer(tmp_path, 2, streams=True)))[2]) > 0.1


def test_a_routers_loss_is_averaged_over_micro_batches(tmp_path: Path) -> None:
    guarded = captured(brim.guard(make_trainer(tmp_path, 2, architecture="MixtralForCausalLM")))
    alone = []
    for start in range(0, WINDOW, 2):  # one micro-batch a step: its auxiliary part at full weight
        trainer = brim.guard(make_trainer(tmp_path, 2, architecture="MixtralForCausalLM", max_steps=1))
        trainer.args.gradient_accumulation_steps = 1
        trainer.train_dataset = trainer.train_dataset[start : start + 2]
        alone.append(captured(trainer)[0])
    from brim.losses.rules import CountingRule

    rows = make_rows("MixtralForCausalLM", None, ROWS)
    rule = CountingRule(key="labels", shifted=True)
    counts = [int(rule.count(collate(rows[start : start + 2]))) for start in range(0, WINDOW, 2)]
    model = build_model(CONFIGS["MixtralForCausalLM"].to_dict(), "MixtralForCausalLM").train()
    parts = []
    for start in range(0, WINDOW, 2):
        model.zero_grad()
        (0.1 * model(**collate(rows[start : start + 2])).aux_loss).backward()
        parts.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double()
                                for p in model.parameters()]))  # fmt: skip
    mean = sum((one - part) * count / sum(counts) for one, part, count in zip(alone, parts, counts, strict=True))
    assert error(guarded[0], mean + torch.stack(parts).mean(0)) < 1e-5


def test_the_logged_loss_is_the_mean_over_the_batch(tmp_path: Path) -> None:
    logged = {}
    for size in (8, 1):
        trainer = brim.guard(make_trainer(tmp_path, size, architecture="T5ForConditionalGeneration"))
        trainer.train()
        logged[size] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[1] == pytest.approx(logged[8], rel=1e-5)
    assert 3 < logged[1][0] < 6


def test_the_evaluation_loss_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    losses = []
    for size in (1, 4, 19):
        trainer = brim.guard(make_trainer(tmp_path, 4, per_device_eval_batch_size=size))
        losses.append(trainer.evaluate()["eval_loss"])
        assert trainer.evaluate(metric_key_prefix="test")["test_loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    stock = [make_trainer(tmp_path, 4, per_device_eval_batch_size=size).evaluate()["eval_loss"] for size in (4, 19)]
    assert abs(stock[0] - stock[1]) > 1e-4


def test_it_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    def sgd(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, lr=0.05)

    def weights(trainer: Any) -> Tensor:
        return torch.cat([p.detach().flatten().double() for p in trainer.model.parameters()])

    options = {"optimizer": sgd, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole = brim.guard(make_trainer(tmp_path / "whole", 2, **options))
    whole.train()
    first = brim.guard(make_trainer(tmp_path / "cut", 2, **{**options, "max_steps": 5}))
    first.add_callback(StopAt(2))
    first.train()
    again = brim.guard(make_trainer(tmp_path / "cut", 2, **options))
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert error(weights(again), weights(whole)) < 1e-6
    assert again.state.global_step == 5


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def test_guarding_is_idempotent_and_undone(tmp_path: Path) -> None:
    trainer, other = make_trainer(tmp_path, 4), make_trainer(tmp_path, 4)
    kind = type(trainer)
    guarded = brim.guard(brim.guard(trainer))
    assert guarded is trainer
    assert isinstance(guarded, kind)
    assert type(guarded) is type(brim.guard(other))
    assert type(guarded).__name__ == kind.__name__
    guarded.train()
    assert brim.unguard(guarded) is trainer
    assert type(trainer) is kind
    assert not [name for name in vars(trainer) if name.startswith("_exact")]
    assert brim.unguard(trainer) is trainer


def test_as_a_mixin(tmp_path: Path) -> None:
    class Mine(brim.ExactAccumulation, InOrder):
        pass

    mixed = captured(make_trainer(tmp_path, 2, architecture="T5ForConditionalGeneration", kind=Mine))
    truth = captured(brim.guard(make_trainer(tmp_path, 8, architecture="T5ForConditionalGeneration")))
    assert error(mixed[0], truth[0]) < 1e-5
    assert type(brim.guard(make_trainer(tmp_path, 2, kind=Mine))) is Mine


def own_mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    scores = outputs["logits"][:, :-1].flatten(0, 1).log_softmax(-1)
    targets = labels[:, 1:].flatten()
    kept = targets != -100
    return -(scores[kept].gather(1, targets[kept, None])).mean()


class OwnLoss(InOrder):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = own_mean(outputs, labels)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("setting", ["compute_loss_func", "compute_loss", "label_smoothing"])
def test_losses_that_the_model_does_not_make(tmp_path: Path, setting: str) -> None:
    def make(size: int) -> Any:
        kind = OwnLoss if setting == "compute_loss" else InOrder
        smoothing = {"label_smoothing_factor": 0.1} if setting == "label_smoothing" else {}
        trainer = make_trainer(tmp_path, size, kind=kind, **smoothing)
        if setting == "compute_loss_func":
            trainer.compute_loss_func = own_mean
        return trainer

    truth = captured(brim.guard(make(8)))
    found = captured(brim.guard(make(2)))
    assert [error(one, other) for one, other in zip(found, truth, strict=True)] == pytest.approx(
        [0] * 3, abs=1e-5
    )
    if setting != "label_smoothing":
        assert error(captured(make(2))[0], truth[0]) > 0.1


class Contrast(InOrder):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        ends = outputs["logits"][:, -1]
        loss = torch.nn.functional.cross_entropy(ends @ ends.T, torch.arange(len(ends)))
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_does_not_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InseparableLoss, match="accumulate_contrastive"):
        brim.guard(make_trainer(tmp_path, 4, kind=Contrast)).train()


REFUSALS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda trainer: object(), "not object"),
    (lambda trainer: setattr(trainer.args, "_n_gpu", 2) or trainer, "DataParallel over 2 GPUs"),
]


@pytest.mark.parametrize(("change", "text"), REFUSALS)
def test_what_cannot_be_guarded_is_refused(tmp_path: Path, change: Any, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        brim.guard(change(make_trainer(tmp_path, 4)))


def test_recovery_needs_exact_accumulation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 4)
    assert brim.guard(trainer, exact=False, watch=False, recover=False) is trainer
    assert type(trainer) is InOrder
    with pytest.raises(InvalidInput, match="exact=True"):
        brim.guard(trainer, exact=False, recover=True)


def test_old_releases_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, 4)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.45.2")  # it replaces itself when used
    with pytest.raises(InvalidInput, match=r"transformers 4\.45\.2 .* 4\.46 or later"):
        brim.guard(trainer)

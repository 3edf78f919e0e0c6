"""An out-of-memory inside Hugging Face's loop: the same weights, steps, losses and order of data as without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from recover_toys import OPTIMIZERS, ROOMY, SAME, Refuser, build, count_steps, differ, flatten, make_windows
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import brim
from brim.devices.capped import CappedMemory
from brim.errors import CannotRecover
from brim.runtime.recovery import RecoveryEvent

SIZE, ACCUMULATION, STEPS, POINTS = 4, 2, 2, 3


class Armed(TrainerCallback):
    """Refuses allocations only once the second window begins, or in evaluation; notes the data that was seen."""

    def __init__(self, refuser: Refuser, *, first: int = 0, training: bool = True) -> None:
        self.refuser, self.first, self.training = refuser, first, training
        refuser.armed = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.refuser.armed = self.training and state.global_step >= self.first

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.refuser.armed = False


def make_rows(number: int = 24) -> list[dict[str, Tensor]]:
    batch = make_windows(1, rows=number)[0]
    batch["labels"][:, :2] = -100
    return [{key: value[index] for key, value in batch.items()} for index in range(number)]


def make_trainer(tmp_path: Path, kind: str = "adamw-foreach", *, model: Any = None, **options: Any) -> Any:
    model = model or build()
    said = {
        "per_device_train_batch_size": SIZE, "gradient_accumulation_steps": ACCUMULATION, "max_steps": STEPS,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "seed": 3,
        **options,
    }  # fmt: skip
    optimizer = OPTIMIZERS[kind](model.parameters())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    rows = make_rows()
    return Trainer(
        model, TrainingArguments(str(tmp_path), **said), train_dataset=rows, eval_dataset=rows[:6],
        optimizers=(optimizer, schedule),
    )  # fmt: skip


def train(trainer: Any, refuser: Refuser, **armed: Any) -> Any:
    seen: list[Tensor] = []
    trainer.add_callback(Armed(refuser, **armed))
    trainer.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    with CappedMemory(ROOMY, refuse=refuser):
        trainer.train()
    return trainer, seen


def read_logs(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("kind", [pytest.param("sgd-foreach", marks=pytest.mark.slow), "adamw-foreach"])
def test_weights_are_those_of_an_undisturbed_run(tmp_path: Path, kind: str) -> None:
    stock = make_trainer(tmp_path, kind)
    stock.train()
    truth, counter = flatten(stock.model), Refuser()
    train(brim.guard(make_trainer(tmp_path, kind)), counter, first=1)
    for number in range(POINTS):
        point = (2 * number + 1) * counter.seen // (2 * POINTS)
        trainer, _ = train(brim.guard(make_trainer(tmp_path, kind)), Refuser(point), first=1)
        assert differ(flatten(trainer.model), truth) <= SAME, point
        assert count_steps(trainer.optimizer) == count_steps(stock.optimizer)
        assert trainer.state.global_step == STEPS
        assert [event.step for event in trainer.recovery_events] == [1]
        assert read_logs(trainer, "loss") == pytest.approx(read_logs(stock, "loss"), rel=1e-4)
        assert read_logs(trainer, "grad_norm") == pytest.approx(read_logs(stock, "grad_norm"), rel=1e-5)
        assert read_logs(trainer, "learning_rate") == read_logs(stock, "learning_rate")
        assert trainer.state.total_flos == stock.state.total_flos


def test_every_sequence_is_seen_once_and_the_order_of_data_is_kept(tmp_path: Path) -> None:
    quiet, undisturbed = train(brim.guard(make_trainer(tmp_path, max_steps=4)), Refuser())
    trainer, seen = train(brim.guard(make_trainer(tmp_path, max_steps=4)), Refuser(40), first=1)
    assert len(trainer.recovery_events) == 1
    window = SIZE * ACCUMULATION
    rows, expected = torch.cat(seen), torch.cat(undisturbed[-4 * ACCUMULATION :])
    assert torch.equal(rows[-3 * window :], expected[-3 * window :])  # run again whole, then on at the new split
    assert [len(batch) for batch in seen[-12:]] == [2] * 12
    assert differ(flatten(trainer.model), flatten(quiet.model)) <= SAME


def test_clipping_is_part_of_the_step(tmp_path: Path) -> None:
    stock = make_trainer(tmp_path)
    stock.train()
    trainer = brim.guard(make_trainer(tmp_path))
    theirs, calls = trainer.accelerator.clip_grad_norm_, []

    def clip(parameters: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            for parameter in list(parameters)[:3]:
                parameter.grad.mul_(0.5)
            raise torch.OutOfMemoryError("half clipped")
        return theirs(parameters, *args)

    trainer.accelerator.clip_grad_norm_ = clip
    trainer.train()
    assert differ(flatten(trainer.model), flatten(stock.model)) <= SAME
    assert [event.where for event in trainer.recovery_events] == ["clipping"]


def test_evaluation_shrinks_its_own_batch_and_nothing_else(tmp_path: Path) -> None:
    stock = brim.guard(make_trainer(tmp_path), recover=False)
    expected = stock.evaluate()["eval_loss"]
    scores = stock.predict(stock.eval_dataset).predictions
    for point in (0, 30):
        trainer = brim.guard(make_trainer(tmp_path, per_device_eval_batch_size=6))
        trainer.evaluate()  # measures the loss
        refuser = Refuser(point)
        refuser.armed = False
        trainer.model.register_forward_pre_hook(lambda *_, refuser=refuser: setattr(refuser, "armed", True))
        with CappedMemory(ROOMY, refuse=refuser):
            found = trainer.predict(trainer.eval_dataset)
        assert found.metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
        assert abs(found.predictions - scores).max() < 1e-6
        assert [event.change for event in trainer.recovery_events] == ["evaluation batch 6 -> 3, training as before"]
        assert trainer._recover_ladder.size is None
        assert trainer.args.train_batch_size == SIZE


def test_when_nothing_is_left_the_last_whole_step_is_a_checkpoint(tmp_path: Path) -> None:
    stock = make_trainer(tmp_path / "stock", max_steps=4)
    stock.train()
    trainer = brim.guard(make_trainer(tmp_path / "own", max_steps=4))
    trainer.model.supports_gradient_checkpointing = False
    with pytest.raises(CannotRecover) as caught:
        train(trainer, Refuser(20, times=10**9), first=2)
    assert (caught.value.step, caught.value.micro_batch_size) == (2, 1)
    assert caught.value.saved == str(tmp_path / "own" / "checkpoint-2")
    again = brim.guard(make_trainer(tmp_path / "own", max_steps=4))
    again.train(resume_from_checkpoint=caught.value.saved)
    assert json.loads((tmp_path / "own" / "brim-recover.json").read_text())["micro_batch_size"] == 1
    assert again._recover_ladder.size == 1  # the restarted run begins with the split that the first came down to
    assert differ(flatten(again.model), flatten(stock.model)) <= SAME


def test_a_new_run_in_the_same_folder_begins_with_its_own_split(tmp_path: Path) -> None:
    (tmp_path / "brim-recover.json").write_text('{"micro_batch_size": 1}')
    trainer = brim.guard(make_trainer(tmp_path))
    trainer.train()
    assert trainer._recover_ladder.size is None


def test_unguard_takes_everything_out_again(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    optimizer, step = trainer.optimizer, trainer.optimizer.step
    brim.guard(trainer).train()
    assert optimizer.step is not step
    brim.unguard(trainer)
    assert type(trainer) is Trainer
    assert optimizer.step is step
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    assert not [name for name in vars(trainer) if name.startswith(("_recover_", "_exact_"))]


def test_training_twice_recovers_twice(tmp_path: Path) -> None:
    trainer, _ = train(brim.guard(make_trainer(tmp_path)), Refuser(30), first=1)
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if not isinstance(c, Armed)]
    trainer, _ = train(trainer, Refuser(30), first=1)
    assert [type(event) for event in trainer.recovery_events] == [RecoveryEvent] * 2


def test_evaluating_first_changes_nothing_of_it(tmp_path: Path) -> None:
    stock = make_trainer(tmp_path)
    stock.train()
    trainer = brim.guard(make_trainer(tmp_path))
    trainer.evaluate()
    counter = Refuser()
    train(brim.guard(make_trainer(tmp_path)), counter, first=1)
    trainer, _ = train(trainer, Refuser(counter.seen - 5), first=1)  # inside the optimizer step
    assert [event.where for event in trainer.recovery_events] == ["optimizer step"]
    assert differ(flatten(trainer.model), flatten(stock.model)) <= SAME


def test_later_windows_may_grow_back(tmp_path: Path) -> None:
    class Grow(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                trainer.recovery.grow()

    trainer = brim.guard(make_trainer(tmp_path, max_steps=3))
    trainer.add_callback(Grow())
    _, seen = train(trainer, Refuser(20), first=1)
    assert [len(batch) for batch in seen[-ACCUMULATION:]] == [SIZE] * ACCUMULATION
    assert len(trainer.recovery_events) == 1

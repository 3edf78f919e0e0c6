"""How others fail at an out-of-memory in the middle of a run, each shown where it is installed, and brim beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from recover_toys import (
    FORM,
    OPTIMIZERS,
    ROOMY,
    ROWS,
    SAME,
    Refuser,
    build,
    count_steps,
    differ,
    flatten,
    make_windows,
    train_undisturbed,
)
from test_recover_trainer import ACCUMULATION, SIZE, make_trainer, train
from torch import Tensor
from transformers import TrainerCallback

import brim
from brim.devices.capped import CappedMemory
from brim.runtime.pieces import cut_pieces


class Diary(TrainerCallback):
    """What a run did, as its loop tells it."""

    def __init__(self) -> None:
        self.begins, self.steps = 0, []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begins += 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


class Failing(TrainerCallback):
    """Runs out of memory once, as the third window begins; how much is left does not matter then."""

    def __init__(self) -> None:
        self.has_failed = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and not self.has_failed:
            self.has_failed = True
            raise torch.OutOfMemoryError("CUDA out of memory.")  # the others look for this text


def test_auto_find_batch_size_restarts_half_trained_with_another_batch(tmp_path: Path) -> None:
    trainer, diary = make_trainer(tmp_path, "sgd", max_steps=3, auto_find_batch_size=True), Diary()
    trainer.optimizer = trainer.lr_scheduler = None  # it refuses to start again with a given one
    trainer.add_callback(diary)
    trainer.add_callback(Failing())
    trainer.train()
    assert diary.steps == [0, 1, 2, 0, 1, 2]  # from the weights that two steps had trained
    assert trainer._train_batch_size < SIZE
    assert trainer.args.gradient_accumulation_steps == ACCUMULATION  # so the effective batch is another one


def test_no_restart_and_the_same_effective_batch(tmp_path: Path) -> None:
    stock = make_trainer(tmp_path, max_steps=3)
    stock.train()
    trainer, diary = brim.guard(make_trainer(tmp_path, max_steps=3)), Diary()
    trainer.add_callback(diary)
    trainer, seen = train(trainer, Refuser(40), first=2)
    assert len(trainer.recovery_events) == 1
    assert (diary.begins, diary.steps) == (1, [0, 1, 2])
    assert sum(len(batch) for batch in seen[-4:]) == SIZE * ACCUMULATION
    assert differ(flatten(trainer.model), flatten(stock.model)) <= SAME


def test_halving_halves(tmp_path: Path) -> None:
    """Changing the arguments of a running trainer changes its accumulation, not its loader: the batch doubles."""

    class Halve(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step:
                args.per_device_train_batch_size //= 2
                args.gradient_accumulation_steps *= 2

    trainer = make_trainer(tmp_path, max_steps=4)  # an epoch has three windows
    trainer.add_callback(Halve())
    _, seen = train(trainer, Refuser())
    assert [len(batch) for batch in seen[3 * ACCUMULATION :]] == [SIZE] * 2 * ACCUMULATION  # the batch has doubled
    trainer, seen = train(brim.guard(make_trainer(tmp_path)), Refuser(40), first=1)
    assert [len(batch) for batch in seen[-2 * ACCUMULATION :]] == [SIZE // 2] * 2 * ACCUMULATION
    assert trainer.recovery_events[0].new_size == SIZE // 2


def test_training_a_batch_again_after_half_a_step_moves_some_weights_twice() -> None:
    """Composer's way: whatever ran out, halve the micro-batch and train the batch again, its step included."""

    def train_again(at: int | None) -> Tensor:
        model, size, refuser = build(), ROWS, Refuser(at)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        refuser.armed = False
        optimizer.register_step_pre_hook(lambda *_: setattr(refuser, "armed", True))
        with CappedMemory(ROOMY, refuse=refuser):
            for window in make_windows():
                while True:
                    refuser.armed = False
                    optimizer.zero_grad()
                    for piece in cut_pieces(window, size):
                        weight = FORM.rule.count(piece) / FORM.rule.count(window)
                        (model(**piece).loss * weight).backward()
                    try:
                        optimizer.step()
                        break
                    except torch.OutOfMemoryError:
                        size //= 2
        return flatten(model)

    truth, _ = train_undisturbed("sgd", max_norm=1e9)
    assert differ(train_again(None), truth) <= SAME
    assert differ(train_again(6), truth) > 1e-3


@pytest.mark.parametrize("kind", [pytest.param("sgd-foreach", marks=pytest.mark.slow), "adamw-foreach"])
def test_no_batch_is_stepped_twice(tmp_path: Path, kind: str) -> None:
    """An out-of-memory inside the step, after some tensors are new: the retry must not move those again."""
    stock = make_trainer(tmp_path, kind)
    stock.train()
    counter = Refuser()
    train(brim.guard(make_trainer(tmp_path, kind)), counter, first=1)
    for back in (2, 10):
        trainer, _ = train(brim.guard(make_trainer(tmp_path, kind)), Refuser(counter.seen - back), first=1)
        assert [event.where for event in trainer.recovery_events] == ["optimizer step"]
        assert differ(flatten(trainer.model), flatten(stock.model)) <= SAME
        assert count_steps(trainer.optimizer) == count_steps(stock.optimizer)

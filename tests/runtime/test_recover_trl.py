"""An out-of-memory inside TRL's trainers: pairs stay pairs, metrics are those of one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
from recover_toys import ROOMY, SAME, Refuser, differ, flatten
from test_guard_trl import make_trainer
from test_recover_trainer import Armed

import brim
from brim.devices.capped import CappedMemory
from brim.errors import CannotRecover


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    torch.set_num_threads(1)


def prepare(kind: str, tmp_path: Path, **options: Any) -> Any:
    trainer = make_trainer(kind, 4, tmp_path, logging_steps=1, **options)
    trainer.model.double()
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.01, foreach=True)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
    if getattr(trainer, "ref_model", None) is not None:
        trainer.ref_model.double()
    return brim.guard(trainer)


def train(trainer: Any, refuser: Refuser) -> Any:
    trainer.add_callback(Armed(refuser, first=1))
    with CappedMemory(ROOMY, refuse=refuser):
        trainer.train()
    return trainer


def read_metrics(trainer: Any) -> list[dict[str, float]]:
    kept = ("num_tokens", "rewards/margins", "rewards/accuracies", "mean_token_accuracy", "loss", "min_reward")
    return [{k: v for k, v in entry.items() if k in kept} for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["sft", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dpo", "reward"))])
def test_weights_are_those_of_an_undisturbed_run(tmp_path: Path, kind: str) -> None:
    counter = Refuser()
    quiet = train(prepare(kind, tmp_path), counter)
    truth = flatten(quiet.model)
    for point in (counter.seen // 4, 5 * counter.seen // 8):
        trainer = train(prepare(kind, tmp_path), Refuser(point))
        assert differ(flatten(trainer.model), truth) <= SAME, point
        assert len(trainer.recovery_events) == 1
        assert trainer._recover_ladder.size == (None if trainer.recovery_events[0].where == "optimizer step" else 2)
        assert trainer._recover_ladder.blocks == (1 if kind == "sft" else 2)
        for found, expected in zip(read_metrics(trainer), read_metrics(quiet), strict=True):
            assert found["num_tokens"] == expected["num_tokens"]
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_packed_rows_are_not_cut(tmp_path: Path) -> None:
    trainer = prepare("sft", tmp_path, padding_free=True, max_length=None)
    trainer.model.supports_gradient_checkpointing = False
    with pytest.raises(CannotRecover, match="several are packed into one"):
        train(trainer, Refuser(60, times=10**9))


def test_evaluation_of_pairs_is_cut_by_pairs(tmp_path: Path) -> None:
    losses = []
    for point in (None, 40):
        trainer = prepare("dpo", tmp_path, per_device_eval_batch_size=4)
        rows = trainer.train_dataset.select(range(8))
        trainer.evaluate(rows)
        refuser = Refuser(point)
        refuser.armed = False
        trainer.model.register_forward_pre_hook(lambda *_, refuser=refuser: setattr(refuser, "armed", True))
        with CappedMemory(ROOMY, refuse=refuser):
            losses.append(trainer.evaluate(rows))
    assert [event.new_size for event in trainer.recovery_events] == [2]
    assert losses[1]["eval_loss"] == pytest.approx(losses[0]["eval_loss"], rel=1e-6)

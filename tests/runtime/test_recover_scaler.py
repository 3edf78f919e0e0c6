"""A GradScaler beside recovery: each window is scaled, unscaled and stepped once, whatever of it was run again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recover_toys import ROOMY, SAME, Refuser, differ, flatten
from test_recover_trainer import make_trainer, train
from torch import Tensor, nn

import brim
from brim.devices.capped import CappedMemory
from brim.losses.form import LossForm
from brim.losses.rules import CountingRule
from brim.runtime.recover import Recovery

WIDTH, ROWS, POINTS = 24, 8, 12
BATCHES = [torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
BATCHES[1] = BATCHES[1] * 1e25
"""Overflows: this step is skipped, and the scale halved."""


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    def forward(self, input_values: Tensor) -> Any:
        return SimpleNamespace(loss=self.inner(input_values).square().mean())


def build(fused: bool) -> tuple[Squares, torch.optim.Optimizer, Any]:
    model = Squares()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused, foreach=not fused)
    return model, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)


def train_plain(fused: bool, max_norm: float | None) -> tuple[Squares, dict[str, Any]]:
    model, optimizer, scaler = build(fused)
    for batch in BATCHES:
        scaler.scale(model(batch).loss).backward()
        scaler.unscale_(optimizer)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model, scaler.state_dict()


def train_refused(fused: bool, max_norm: float | None, refuser: Refuser) -> tuple[Squares, dict[str, Any], set[str]]:
    model, optimizer, scaler = build(fused)
    recovery = Recovery(
        model, optimizer, micro_batch_size=ROWS, form=LossForm(rule=CountingRule()), max_grad_norm=max_norm,
        scaler=scaler,
    )  # fmt: skip
    with CappedMemory(ROOMY, refuse=refuser):
        for batch in BATCHES:
            recovery.step({"input_values": batch})
    return model, scaler.state_dict(), {event.where for event in recovery.events}


@pytest.mark.parametrize(("fused", "max_norm"), [(False, None), (False, 1.0), (True, 1.0)])
def test_weights_and_scale_are_those_of_a_plain_loop(fused: bool, max_norm: float | None) -> None:
    truth, scale = train_plain(fused, max_norm)
    counter, places = Refuser(), set()
    train_refused(fused, max_norm, counter)
    for number in range(POINTS):
        model, found, where = train_refused(fused, max_norm, Refuser(number * counter.seen // POINTS))
        assert found == scale, number
        assert where, number
        places |= where
        for one, other in zip(model.parameters(), truth.parameters(), strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), number
    assert {"forward", "backward"} <= places


@pytest.mark.parametrize("fails_in", ["unscaling", "clipping"])
def test_what_was_unscaled_is_unscaled_anew(fails_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, scale = train_plain(False, 1.0)
    holder, name = (torch.amp.GradScaler, "unscale_") if fails_in == "unscaling" else (nn.utils, "clip_grad_norm_")
    theirs, calls = getattr(holder, name), []

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        found = theirs(*args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("refused")
        return found

    monkeypatch.setattr(holder, name, fail_once)
    model, found, where = train_refused(False, 1.0, Refuser())
    assert (found, where) == (scale, {"clipping"})
    for one, other in zip(model.parameters(), truth.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [pytest.param("forward", marks=pytest.mark.slow), "clipping", "optimizer step"])
def test_inside_hugging_faces_loop(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(guarded: bool) -> Any:
        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
        return brim.guard(trainer, recover=True) if guarded else trainer

    stock, counter = prepare(False), Refuser()
    stock.train()
    train(prepare(True), counter, first=1)
    at = {"forward": 10, "clipping": None, "optimizer step": counter.seen - 2}[place]
    trainer, failing = prepare(True), iter([True])
    theirs = nn.utils.clip_grad_norm_

    def clip(*args: Any, **kwargs: Any) -> Any:
        found = theirs(*args, **kwargs)
        if place == "clipping" and next(failing, False):
            raise torch.OutOfMemoryError("refused")
        return found

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip)
    train(trainer, Refuser(at), first=1)
    assert [event.where for event in trainer.recovery_events] == [place]
    assert trainer.accelerator.scaler.state_dict() == stock.accelerator.scaler.state_dict()
    assert differ(flatten(trainer.model), flatten(stock.model)) <= SAME

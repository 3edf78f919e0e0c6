"""An out-of-memory at any point of a step, in plain PyTorch: the run trains as if there had been none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from recover_toys import (
    FORM,
    LENGTH,
    OPTIMIZERS,
    ROOMY,
    ROWS,
    SAME,
    Refuser,
    build,
    differ,
    flatten,
    make_windows,
    train_refused,
    train_undisturbed,
)
from torch import nn

import brim
from brim.devices.capped import CappedMemory
from brim.errors import CannotRecover, InvalidInput
from brim.runtime.recover import Recovery
from brim.runtime.safe_step import COVERED, SafeStep

NUM_POINTS = 3


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_are_those_of_an_undisturbed_run(kind: str) -> None:
    truth, steps = train_undisturbed(kind)
    counter = Refuser()
    train_refused(kind, counter)
    offset = sorted(OPTIMIZERS).index(kind)
    for number in range(NUM_POINTS):
        point = (number * counter.seen + offset * counter.seen // len(OPTIMIZERS)) // NUM_POINTS
        weights, taken, recovery = train_refused(kind, Refuser(point))
        assert differ(weights, truth) <= SAME, point
        assert taken == steps
        assert len(recovery.events) == 1, point


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "adamw-fused"])
def test_every_point_inside_the_optimizer_step(kind: str) -> None:
    """The first step, where states are made, and a later one; stock ends half-stepped at most of these points."""
    model = build()
    optimizer = OPTIMIZERS[kind](model.parameters())
    refuser = Refuser()
    refuser.armed = False
    with CappedMemory(ROOMY, refuse=refuser):
        for window in make_windows():
            model(**window).loss.backward()
            before, states = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
            truth = step_copy(kind, model, states, Refuser(), plain=True)
            refuser.armed, refuser.seen = False, 0
            counted = Refuser()
            step_copy(kind, before, states, counted)
            for point in range(0, counted.seen, 3):
                again = step_copy(kind, model, states, Refuser(point))
                assert torch.equal(again[0], truth[0]), point
                assert all(torch.equal(a, b) for a, b in zip(again[1], truth[1], strict=True)), point
            optimizer.step()
            optimizer.zero_grad()


def step_copy(kind: str, model: nn.Module, states: Any, refuser: Refuser, plain: bool = False) -> Any:
    """Take one step of a copy; return its weights and states."""
    twin = copy.deepcopy(model)
    for parameter, original in zip(twin.parameters(), model.parameters(), strict=True):
        parameter.grad = None if original.grad is None else original.grad.clone()
    optimizer = OPTIMIZERS[kind](twin.parameters())
    optimizer.load_state_dict(copy.deepcopy(states))
    with CappedMemory(ROOMY, refuse=refuser):
        optimizer.step() if plain else SafeStep(optimizer)()
    values = [value for state in optimizer.state.values() for value in state.values()]
    return flatten(twin), [value for value in values if isinstance(value, torch.Tensor)]


def test_later_windows_keep_the_split_and_may_grow_back() -> None:
    model, windows = build(), make_windows(3)
    recovery = Recovery(model, OPTIMIZERS["sgd"](model.parameters()), micro_batch_size=4, form=FORM)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
    with CappedMemory(ROOMY, refuse=Refuser(50)):
        recovery.step(windows[0])
    assert recovery.micro_batch_size == 2
    seen.clear()
    recovery.step(windows[1])
    assert seen == [2, 2, 2, 2]
    recovery.grow()
    recovery.grow()
    assert recovery.micro_batch_size == 4  # never beyond what was planned
    seen.clear()
    recovery.step(windows[2])
    assert seen == [4, 4]


def test_the_event_is_one_line_with_both_splits(caplog: pytest.LogCaptureFixture) -> None:
    _, _, recovery = train_refused("sgd", Refuser(10))
    assert str(recovery.events[0]) in caplog.text
    assert "micro-batch 4 -> 2, same 8 sequences a step" in str(recovery.events[0])
    assert recovery.events[0].where == "forward"


def test_a_real_capacity_is_found() -> None:
    """A device too small for a micro-batch of 8, and of 4: training goes on at 2 or 1, the result is the same."""
    truth, _ = train_undisturbed("adamw")
    windows = make_windows()

    def train(size: int, capacity_bytes: int) -> tuple[Any, Recovery, CappedMemory]:
        model = build()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        recovery = Recovery(model, optimizer, micro_batch_size=size, max_grad_norm=1.0, form=FORM)
        with CappedMemory(capacity_bytes) as capped:
            for window in windows:
                recovery.step(window)
        return flatten(model), recovery, capped

    _, _, two = train(2, ROOMY)
    weights, recovery, capped = train(8, two.peak_bytes)
    assert capped.num_ooms >= 2
    assert recovery.micro_batch_size in (1, 2)
    assert differ(weights, truth) <= SAME


class Noisy(nn.Module):
    """Draws random numbers and counts how often it ran, as dropout and running means do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build()
        self.register_buffer("runs", torch.zeros(4096))
        self.drawn: list[float] = []

    def forward(self, **inputs: Any) -> Any:
        self.runs += 1
        self.drawn.append(float(torch.rand(())))
        return self.inner(**inputs)


def test_random_state_and_buffers_are_those_of_the_windows_start() -> None:
    model = Noisy()
    recovery = Recovery(model, OPTIMIZERS["sgd"](model.parameters()), micro_batch_size=4, form=FORM)
    torch.manual_seed(7)
    with CappedMemory(ROOMY, refuse=Refuser(150)):
        recovery.step(make_windows()[0])
    assert len(recovery.events) == 1
    assert float(model.runs[0]) == ROWS / 2  # 4 pieces of 2, whatever ran before them
    torch.manual_seed(7)
    assert model.drawn[-4:] == [float(torch.rand(())) for _ in range(4)]


def test_at_one_sequence_checkpointing_is_turned_on() -> None:
    model = build()
    recovery = Recovery(model, OPTIMIZERS["sgd"](model.parameters()), micro_batch_size=1, form=FORM)
    truth = build()
    with CappedMemory(ROOMY, refuse=Refuser(30, times=2)):
        recovery.step(make_windows()[0])
    assert model.is_gradient_checkpointing
    assert [event.change for event in recovery.events] == [
        "free blocks given back, tried once more", "activation checkpointing turned on",
    ]  # fmt: skip
    plain = OPTIMIZERS["sgd"](truth.parameters())
    truth(**make_windows()[0]).loss.backward()
    plain.step()
    assert differ(flatten(model), flatten(truth)) <= SAME


def test_when_nothing_is_left_it_stops_with_the_last_whole_step(tmp_path: Path) -> None:
    model, windows = build(), make_windows()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    recovery = Recovery(model, optimizer, micro_batch_size=2, form=FORM, folder=tmp_path)
    recovery.step(windows[0])
    whole = flatten(model)
    with CappedMemory(ROOMY, refuse=Refuser(30, times=10**9)), pytest.raises(CannotRecover) as caught:
        recovery.step(windows[1])
    assert (caught.value.step, caught.value.micro_batch_size, caught.value.exit_code) == (1, 1, 3)
    assert caught.value.saved == str(tmp_path)
    assert torch.equal(flatten(model), whole)
    other = build()
    stepper = OPTIMIZERS["adamw"](other.parameters())
    again = Recovery(other, stepper, micro_batch_size=2, form=FORM, folder=tmp_path)
    assert again.resume() == 1
    assert again.micro_batch_size == 1  # what the first run had come down to
    assert torch.equal(flatten(other), whole)
    again.step(windows[1])
    truth, _ = train_undisturbed("adamw", max_norm=1e9)
    assert differ(flatten(other), truth) <= SAME


def test_an_optimizer_that_cannot_be_taken_apart_stops_the_run() -> None:
    class Own(torch.optim.AdamW):
        """Of no kind that is known to treat tensors one by one."""

    model = build()
    assert Own not in COVERED
    recovery = Recovery(model, Own(model.parameters(), foreach=True), micro_batch_size=8, form=FORM)
    counter = Refuser()
    with CappedMemory(ROOMY, refuse=counter):
        recovery.step(make_windows()[0])
    model = build()
    recovery = Recovery(model, Own(model.parameters(), foreach=True), micro_batch_size=8, form=FORM)
    with CappedMemory(ROOMY, refuse=Refuser(counter.seen - 2)), pytest.raises(CannotRecover, match="inside its step"):
        recovery.step(make_windows()[0])


def test_packed_rows_cannot_be_split_and_it_says_so() -> None:
    model = build()
    model.supports_gradient_checkpointing = False
    window = {key: value[:1] for key, value in make_windows()[0].items()}
    recovery = Recovery(model, OPTIMIZERS["sgd"](model.parameters()), form=FORM)
    with (
        CappedMemory(ROOMY, refuse=Refuser(30, times=10**9)),
        pytest.raises(CannotRecover, match="several packed into one"),
    ):
        recovery.step(window)


def test_other_errors_pass_whatever_their_text_says() -> None:
    def lie(inputs: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    model = build()
    recovery = Recovery(model, OPTIMIZERS["sgd"](model.parameters()), micro_batch_size=4, form=FORM, loss=lie)
    with pytest.raises(RuntimeError, match="Tried to allocate"):
        recovery.step(make_windows()[0])
    assert not recovery.events


def test_the_form_is_measured_with_what_memory_there_is() -> None:
    truth, _ = train_undisturbed("sgd")
    model, windows = build(), make_windows()
    recovery = brim.Recovery(model, OPTIMIZERS["sgd"](model.parameters()), micro_batch_size=4, max_grad_norm=1.0)
    with CappedMemory(ROOMY, refuse=Refuser(3)):
        for window in windows:
            recovery.step(window)
    assert differ(flatten(model), truth) <= SAME


@pytest.mark.parametrize(("size", "batch"), [(0, None), (4, [])])
def test_what_cannot_be_meant_is_refused(size: int, batch: Any) -> None:
    model = build()
    with pytest.raises(InvalidInput):
        Recovery(model, OPTIMIZERS["sgd"](model.parameters()), micro_batch_size=size, form=FORM).step(batch)
    assert LENGTH

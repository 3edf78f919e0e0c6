"""An out-of-memory inside the step of each optimizer that is covered: the same to the bit, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recover_toys import ROOMY, Refuser
from torch import nn

from brim.devices.capped import CappedMemory
from brim.runtime.safe_step import HalfStepped, SafeStep

STEPS = 2
MAKE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, foreach=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, foreach=True),
    "adamax": lambda p: torch.optim.Adamax(p, foreach=True),
    "nadam": lambda p: torch.optim.NAdam(p, foreach=True),
    "radam": lambda p: torch.optim.RAdam(p, foreach=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True, maximize=True, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, foreach=True),
    "muon": lambda p: torch.optim.Muon([one for one in p if one.dim() == 2]),
}


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(24, 24) for _ in range(3)))


def give_gradients(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def run(kind: str, refuser: Refuser, *, safe: bool = True) -> list[torch.Tensor]:
    """Return weights and states after a few steps, in the first or a later of which memory is refused."""
    model = build()
    optimizer = MAKE[kind](list(model.parameters()))
    step = SafeStep(optimizer) if safe else optimizer.step
    with CappedMemory(ROOMY, refuse=refuser):
        for _ in range(STEPS):
            refuser.armed = False
            give_gradients(model)
            refuser.armed = True
            step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [*model.parameters(), *(value for value in states if isinstance(value, torch.Tensor))]


@pytest.mark.parametrize("kind", MAKE)
def test_to_the_bit(kind: str) -> None:
    if kind == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    truth, counter = run(kind, Refuser(), safe=False), Refuser()
    run(kind, counter)
    points = range(0, counter.seen, max(counter.seen // 12, 1))
    assert points or kind.endswith("fused")
    for point in points:
        found = run(kind, Refuser(point))
        assert all(torch.equal(one, other) for one, other in zip(found, truth, strict=True)), point


def test_one_that_is_not_known_stops_and_says_so() -> None:
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    model = build()
    give_gradients(model)
    step = SafeStep(adafactor(model.parameters()))
    assert not step.covers
    with (
        CappedMemory(ROOMY, refuse=Refuser(5)),
        pytest.raises(HalfStepped, match="Adafactor ran out of memory inside its step"),
    ):
        step()


def test_hooks_of_a_step_run_once() -> None:
    model, calls = build(), []
    give_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    step = SafeStep(optimizer)
    assert not step.covers
    step()
    assert calls == [1]

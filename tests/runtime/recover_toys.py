"""A tiny model, its windows, and an out-of-memory at any allocation of them that is worth the name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from runtime_toys import IGNORED, SIZES
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from brim.devices.capped import BLOCK_BYTES, CappedMemory
from brim.losses.form import LossForm
from brim.losses.rules import CountingRule
from brim.runtime.recover import Recovery

ROWS, LENGTH, STEPS, ROOMY = 8, 12, 2, 2**40
FORM = LossForm(rule=CountingRule(key="labels", shifted=True))
SAME = 1e-6
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, foreach=False),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


def build(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager", **options)).double().train()


def make_windows(steps: int = STEPS, rows: int = ROWS) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    windows = []
    for _ in range(steps):
        tokens = torch.randint(3, 31, (rows, LENGTH), generator=draw)
        labels = tokens.clone()
        for row in range(rows):
            labels[row, :row] = IGNORED
        windows.append({"input_ids": tokens, "labels": labels})
    return windows


class Refuser:
    """Refuses one of the allocations that are larger than a block; scalars and counts are not what memory runs out of.

    Counts from when it is armed; `at` None refuses none.
    """

    def __init__(self, at: int | None = None, times: int = 1) -> None:
        self.at, self.times, self.seen, self.armed = at, times, 0, True

    def __call__(self, number: int, num_bytes: int) -> bool:
        if num_bytes <= BLOCK_BYTES or not self.armed:
            return False
        self.seen += 1
        return self.at is not None and self.at < self.seen <= self.at + self.times


def flatten(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])


def count_steps(optimizer: torch.optim.Optimizer) -> set[float]:
    return {float(state["step"]) for state in optimizer.state.values() if "step" in state}


def train_undisturbed(kind: str, max_norm: float = 1.0) -> tuple[Tensor, set[float]]:
    model = build()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for window in make_windows():
        model(**window).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return flatten(model), count_steps(optimizer)


def train_refused(kind: str, refuser: Refuser, *, size: int = 4) -> tuple[Tensor, set[float], Recovery]:
    """Train with one allocation refused; return weights, step counts and what was survived."""
    model, windows = build(), make_windows()
    optimizer = OPTIMIZERS[kind](model.parameters())
    recovery = Recovery(model, optimizer, micro_batch_size=size, max_grad_norm=1.0, form=FORM)
    with CappedMemory(ROOMY, refuse=refuser):
        for window in windows:
            recovery.step(window)
    return flatten(model), count_steps(optimizer), recovery


def differ(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())

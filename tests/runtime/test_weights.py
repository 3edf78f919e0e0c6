"""Fifty steps of real training end with the same weights however the batch is split."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, T5Config
from two_ranks import run_both, run_checks

import brim
from brim.checks.sequences import collate, make_rows
from brim.checks.subjects import build_model

MODELS = {"LlamaForCausalLM": LlamaConfig, "T5ForConditionalGeneration": T5Config}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}
LIMITS = {("sgd", "fp32"): 1e-6, ("adamw", "fp32"): 1e-5, ("sgd", "fp64"): 1e-6, ("adamw", "fp64"): 1e-6}
STEPS, BATCH = 50, 8


def make_model(architecture: str, precision: str) -> nn.Module:
    model = build_model(MODELS[architecture]().to_dict(), architecture)
    return model.to(torch.float64 if precision == "fp64" else torch.float32).train()


def train(module: nn.Module, optimizer: str, architecture: str, size: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """Return all weights after 50 steps; each step has its own eight sequences."""
    config = getattr(module, "module", module).config
    rows = make_rows(architecture, config, BATCH * 5, seed=7)
    stepper = OPTIMIZERS[optimizer](module.parameters())
    for step in range(STEPS):
        start = BATCH * (step % 5)
        mine = rows[start : start + BATCH][rank::ranks]
        batches = [collate(mine[at : at + size]) for at in range(0, len(mine), size)]
        for micro in brim.accumulate(batches, model=module):
            micro.backward(module(**micro.inputs).loss)
        stepper.step()
        stepper.zero_grad()
    return torch.cat([parameter.detach().flatten().double() for parameter in module.parameters()])


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("architecture", MODELS)
def test_every_split_ends_with_the_same_weights(architecture: str, optimizer: str, precision: str) -> None:
    torch.set_num_threads(1)
    model = make_model(architecture, precision)
    before = torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])
    ends = {size: train(copy.deepcopy(model), optimizer, architecture, size) for size in (8, 4, 2, 1)}
    assert distance(ends[8], before) > 1e-3  # it has learned something
    limit = LIMITS[optimizer, precision]
    assert {size: distance(ends[8], end) for size, end in ends.items() if distance(ends[8], end) > limit} == {}


def save_ends(rank: int, folder: str, architecture: str) -> None:
    """Train on both ranks in every way; the modules are gone when the ranks leave each other."""
    ends = {}
    for optimizer, precision in LIMITS:
        module = nn.parallel.DistributedDataParallel(make_model(architecture, precision))
        ends[optimizer, precision] = train(module, optimizer, architecture, 4, rank, 2)
    if rank == 0:
        torch.save(ends, os.path.join(folder, "ends.pt"))


@pytest.mark.parametrize("architecture", MODELS)
def test_two_ranks_end_with_the_weights_of_one(tmp_path: Any, architecture: str) -> None:
    torch.set_num_threads(1)
    check = partial(save_ends, folder=str(tmp_path), architecture=architecture)
    run_both(partial(run_checks, checks=[check]), most_seconds=250)
    together = torch.load(tmp_path / "ends.pt")
    for (optimizer, precision), limit in LIMITS.items():
        alone = train(make_model(architecture, precision), optimizer, architecture, 8)
        assert distance(alone, together[optimizer, precision]) <= limit, (optimizer, precision)

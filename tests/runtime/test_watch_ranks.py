"""Two ranks over gloo: the first one speaks, of the worst; both make the same collectives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import run_both, run_checks
from watch_toys import make_batch, plan_job, say_of

import brim
from brim.devices.capped import CappedMemory
from brim.runtime.run_record import RUN_FILE, read_run
from brim.units import MIB

FOLDER = "BRIM_TEST_FOLDER"


def check_plain(rank: int) -> None:
    """The second rank has a smaller card, and holds 40 MiB that nobody planned."""
    folder = os.environ[FOLDER]
    model = DistributedDataParallel(nn.Embedding(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lines: list[str] = []
    notes: list[Any] = []
    batches = [make_batch(2, 12)] * 6
    with CappedMemory((80 if rank else 100) * MIB):
        extra = torch.zeros(10 * MIB) if rank else None
        plan = say_of(plan_job(), 4 * MIB)
        with brim.watch(plan, folder=folder, note=notes.append, tell=lines.append, num_steps=6) as w:
            for batch in w.steps(batches):
                model(batch["input_ids"]).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        del extra
    if rank:
        assert (lines, notes, w.observation) == ([], [], None)
        return
    (observation,) = notes
    assert observation == w.observation and observation.num_ranks == 2
    assert observation.peak_allocated_bytes > 40 * MIB and observation.capacity_bytes == 80 * MIB
    assert any("on rank 1" in line for line in lines)
    assert "estimate_low" in {verdict.code for verdict in w.verdicts}


def check_trainer(rank: int) -> None:
    """The guard's own callback; evaluation and a log in between disturb no collective."""
    folder = os.environ[FOLDER]
    from test_callback import make_rows as make_lists
    from test_callback import make_trainer

    with CappedMemory(1000 * MIB):
        extra = torch.zeros(10 * MIB) if rank else None
        options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 7, "ddp_backend": "gloo"}
        trainer = make_trainer(Path(folder), make_lists(*[16 + 8 * rank] * 64), **options)
        brim.guard(trainer, say_of(plan_job(), 4 * MIB), watch=True).train()
        del extra
    if not rank:
        path = os.path.join(folder, RUN_FILE)
        record = read_run(Path(path).read_bytes(), path=path)
        assert record.measured.num_ranks == 2 and record.measured.num_steps == 7
        assert record.measured.peak_allocated_bytes is not None
        assert record.measured.peak_allocated_bytes > 40 * MIB
        assert {"split", "estimate_low"} <= {one.code for one in record.verdicts}


def run_plain(rank: int, port: int) -> None:
    run_checks(rank, port, [check_plain])


def run_trainer(rank: int, port: int) -> None:
    run_checks(rank, port, [check_trainer])


def test_two_ranks_say_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    run_both(run_plain, most_seconds=100)


@pytest.mark.slow
def test_two_ranks_of_a_trainer_say_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    run_both(run_trainer, most_seconds=150)

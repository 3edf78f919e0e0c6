"""Two ranks over gloo: the first one speaks, of the worst; both make the same collectives."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runtime_toys import build_llama, cut, make_rows
from torch.nn.parallel import DistributedDataParallel
from watch_toys import plan_job, say_of

import brim
from brim.devices.capped import CappedMemory
from brim.runtime.run_record import RUN_FILE, read_run
from brim.units import MIB


def check_plain(rank: int, folder: str) -> None:
    """The second rank has longer rows, a smaller card, and holds 40 MiB that nobody planned."""
    model = DistributedDataParallel(build_llama())
    optimizer = torch.optim.AdamW(model.parameters())
    lines: list[str] = []
    notes: list[Any] = []
    batches = cut(make_rows([12, 12] * 6), 2)
    with CappedMemory((80 if rank else 100) * MIB):
        extra = torch.zeros(10 * MIB) if rank else None
        plan = say_of(plan_job(), 4 * MIB)
        with brim.watch(plan, folder=folder, note=notes.append, tell=lines.append, num_steps=6) as w:
            for batch in w.steps(batches):
                model(**batch).loss.backward()
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


def check_trainer(rank: int, folder: str) -> None:
    """The guard's own callback; evaluation and a log in between disturb no collective."""
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


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        check_plain(rank, os.path.join(folder, "plain"))
        check_trainer(rank, os.path.join(folder, "trainer"))
    finally:
        dist.destroy_process_group()


def test_two_ranks_say_the_worst(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)

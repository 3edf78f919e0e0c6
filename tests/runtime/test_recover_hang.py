"""What cannot be taken back, a hang or an out-of-memory inside a collective, ends in bounded time and goes on later."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from recover_toys import SAME, differ, make_windows, train_undisturbed
from test_recover_ranks import KIND, prepare, read_whole, spawn, take_mine
from torch import Tensor
from two_ranks import hold_store, join_ranks

from brim.errors import CannotRecover
from brim.runtime.last_whole import EXIT_CODE, read_record

REFUSED, TOLD, LOST = 3, 4, 5
SECONDS_TO_WAIT, SECONDS_IN_ALL = 8.0, 200.0


def break_off(rank: int, port: int, folder: Path, how: str) -> None:
    """In the second step one rank sleeps, or runs out of memory while gradients are reduced."""
    join_ranks(rank, port)
    wrap = "fsdp2" if how == "hang" else "ddp"
    recovery = prepare(wrap, folder=folder, overlap=True, timeout_seconds=SECONDS_TO_WAIT)
    first, second = make_windows()
    recovery.step(take_mine(first, rank))
    if rank == 0 and how == "hang":
        recovery.model.register_forward_pre_hook(lambda *_: time.sleep(600))
    if rank == 0 and how == "late":
        recovery.model.module.model.embed_tokens.weight.register_hook(lambda gradient: refuse(recovery))
    try:
        recovery.step(take_mine(second, rank))
    except CannotRecover as error:
        os._exit(TOLD if "a restarted run begins with a smaller split" in str(error) else REFUSED)
    except RuntimeError:
        os._exit(LOST)  # the other rank is gone


def refuse(recovery: object) -> Tensor:
    if recovery._ladder.agreement.is_open:  # type: ignore[attr-defined]
        return None  # type: ignore[return-value]  # not yet the backward that reduces
    raise torch.OutOfMemoryError("refused")


def go_on(rank: int, wrap: str, folder: Path) -> None:
    truth, _ = train_undisturbed(KIND)
    recovery = prepare(wrap, folder=folder)
    assert recovery.resume() == 1
    assert recovery.micro_batch_size == 1
    recovery.step(take_mine(make_windows()[1], rank))
    assert differ(read_whole(recovery.model), truth) <= SAME


@pytest.mark.slow
@pytest.mark.parametrize(("how", "wrap"), [("hang", "fsdp2"), ("late", "ddp")])
def test_it_ends_and_the_run_goes_on(tmp_path: Path, how: str, wrap: str) -> None:
    store, context = hold_store(), mp.get_context("spawn")
    ranks = [context.Process(target=break_off, args=(rank, store.port, tmp_path, how)) for rank in range(2)]
    for one in ranks:
        one.start()
    until = time.monotonic() + SECONDS_IN_ALL
    for one in ranks:
        one.join(max(until - time.monotonic(), 0.1))
    codes = [one.exitcode for one in ranks]
    for one in ranks:
        one.kill()
    assert codes in ([EXIT_CODE, EXIT_CODE], [EXIT_CODE, LOST]) if how == "hang" else codes == [TOLD, LOST]
    assert read_record(tmp_path)["micro_batch_size"] == 1
    spawn(partial(go_on, wrap=wrap, folder=tmp_path))


@pytest.mark.slow
def test_torchrun_restarts_it_with_the_smaller_split(tmp_path: Path) -> None:
    job = Path(__file__).with_name("elastic_job.py")
    paths = [str(job.parent), str(job.parent.parent), *sys.path]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
         str(job), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        timeout=SECONDS_IN_ALL, check=True,
    )  # fmt: skip
    assert (tmp_path / "done").read_text(encoding="utf-8") == "1 1"  # steps resumed from, micro-batch

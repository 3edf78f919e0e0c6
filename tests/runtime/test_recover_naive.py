"""The two obvious ways to agree on an out-of-memory, and how they end: an abort under DDP, a hang under FSDP2."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_ranks import hold_store, join_ranks

SECONDS_TO_START, SECONDS_TO_END = 120.0, 5.0
WIDTH = 32


def build() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))


def refuse(*_: object) -> None:
    raise torch.OutOfMemoryError("refused")


def agree_naively(model: nn.Module, failed: Path) -> None:
    """Each rank catches its own error; then flags are reduced over the group that gradients use."""
    flag = torch.zeros(1)
    try:
        model(torch.ones(2, WIDTH)).sum().backward()
    except torch.OutOfMemoryError:
        flag += 1
        failed.touch()
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    assert flag == 1
    model(torch.ones(1, WIDTH)).sum().backward()
    dist.barrier()


def agree_under_ddp(rank: int, port: int, failed: Path) -> None:
    """One rank fails in the middle of backward: some buckets are reduced, others never will be."""
    join_ranks(rank, port)
    model = DistributedDataParallel(build(), bucket_cap_mb=0.001)
    if rank == 0:
        model.module[1].weight.register_hook(refuse)
    agree_naively(model, failed)


def agree_under_fsdp2(rank: int, port: int, failed: Path) -> None:
    """The rank that failed waits for a flag, the other for its part of a layer's weights."""
    join_ranks(rank, port)
    model = build()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    if rank == 0:
        model[1].register_forward_pre_hook(refuse)
    agree_naively(model, failed)


@pytest.mark.parametrize("agree", [agree_under_ddp, agree_under_fsdp2])
def test_no_rank_ends_well(agree: Callable[[int, int, Path], None], tmp_path: Path) -> None:
    store, failed = hold_store(), tmp_path / "failed"
    context = mp.get_context("spawn")
    ranks = [context.Process(target=agree, args=(rank, store.port, failed)) for rank in range(2)]
    for one in ranks:
        one.start()
    until = time.monotonic() + SECONDS_TO_START
    while not failed.exists() and time.monotonic() < until and any(one.is_alive() for one in ranks):
        time.sleep(0.05)
    assert failed.exists()
    until = time.monotonic() + SECONDS_TO_END
    for one in ranks:
        one.join(max(until - time.monotonic(), 0.1))
    codes = [one.exitcode for one in ranks]
    for one in ranks:
        one.kill()
    assert codes == [None, None] if agree is agree_under_fsdp2 else -signal.SIGABRT in codes  # None: it still waits

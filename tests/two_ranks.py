"""Two gloo ranks on this machine's CPU, as torchrun starts them, ended when they wait for each other too long."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[[int], None]


def join_ranks(rank: int, port: int, **settings: str) -> None:
    """Join the process group.

    Args:
        rank: 0 or 1. port: of the store that the process which started them holds.
        settings: environment variables beside those that torchrun sets.
    """
    torch.set_num_threads(1)
    gc.freeze()  # an out-of-memory collects garbage: not through all that was imported
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        GROUP_RANK="0", ACCELERATE_USE_CPU="true", **settings,
    )  # fmt: skip
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=300))


def run_checks(rank: int, port: int, checks: Sequence[Check], **settings: str) -> None:
    """Run every check on one rank; the first that fails ends both ranks.

    What a check has made is gone before the barrier: a DDP module that is the last to hold the process group ends it
    with the interpreter's lock held, which a thread of gloo's may wait for that still lets go of a reduction.

    Args:
        rank, port, settings: as in `join_ranks`.
        checks: each is given the rank.
    """
    join_ranks(rank, port, **settings)
    for check in checks:
        check(rank)
        dist.barrier()
    dist.destroy_process_group()


def hold_store() -> Any:
    """Return the store where ranks meet, held by this process while they run; it has the port.

    A port that is looked up here and opened by a rank seconds later, when it has imported torch, may be another's then.
    """
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def run_both(run_rank: Callable[[int, int], None], most_seconds: float) -> None:
    """Run a function of (rank, port) on both ranks; fail if they do not end in time."""
    store = hold_store()
    running: Any = mp.spawn(run_rank, args=(store.port,), nprocs=2, join=False)
    started = time.monotonic()
    while not running.join(timeout=5):
        if time.monotonic() - started > most_seconds:
            for process in running.processes:
                process.kill()
            raise AssertionError("ranks wait for each other")

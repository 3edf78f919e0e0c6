"""Two gloo ranks on this machine's CPU, as torchrun starts them, ended when they wait for each other too long."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[[int], None]


def run_checks(rank: int, port: int, checks: Sequence[Check], **settings: str) -> None:
    """Run every check on one rank; the first that fails ends both ranks.

    Args:
        rank: 0 or 1. port: where they meet, free on this machine.
        checks: each is given the rank.
        settings: environment variables beside those that torchrun sets.
    """
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        GROUP_RANK="0", ACCELERATE_USE_CPU="true", **settings,
    )  # fmt: skip
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for check in checks:
        check(rank)
        dist.barrier()
    dist.destroy_process_group()


def run_both(run_rank: Callable[[int, int], None], most_seconds: float) -> None:
    """Run a function of (rank, port) on both ranks; fail if they do not end in time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running: Any = mp.spawn(run_rank, args=(port,), nprocs=2, join=False)
    started = time.monotonic()
    while not running.join(timeout=5):
        if time.monotonic() - started > most_seconds:
            for process in running.processes:
                process.kill()
            raise AssertionError("ranks wait for each other")

"""A run under torchrun in which a rank is lost once, in the middle of its second step; the restarted one ends it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from recover_toys import SAME, differ, make_windows, train_undisturbed
from test_recover_ranks import KIND, prepare, read_whole, take_mine


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, is_first_run = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    recovery = prepare("fsdp2", folder=folder, timeout_seconds=10.0 if is_first_run else 200.0)
    taken = recovery.resume()
    if rank == 0 and is_first_run:
        recovery.model.model.layers[1].register_forward_pre_hook(lambda *_: time.sleep(600 * recovery.num_steps))
    for window in make_windows()[taken:]:
        recovery.step(take_mine(window, rank))
    truth, _ = train_undisturbed(KIND)
    assert differ(read_whole(recovery.model), truth) <= SAME
    if rank == 0:
        (folder / "done").write_text(f"{taken} {recovery.micro_batch_size}", encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

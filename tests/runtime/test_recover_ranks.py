"""An out-of-memory on one of two ranks, over gloo: no rank is left alone in a collective, and none aborts."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from recover_toys import (
    FORM,
    OPTIMIZERS,
    ROOMY,
    SAME,
    Refuser,
    build,
    count_steps,
    differ,
    make_windows,
    train_undisturbed,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from brim.devices.capped import CappedMemory
from brim.runtime.last_whole import EXIT_CODE, read_record
from brim.runtime.recover import Recovery

SECONDS = 120.0


def shard(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": DistributedDataParallel, "fsdp2": shard}


def read_whole(model: nn.Module) -> Tensor:
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([one.detach().flatten().double() for one in full])


def take_mine(window: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return this rank's rows: 3 of the 8 on one, 5 on the other."""
    return {key: value[3:] if rank else value[:3] for key, value in window.items()}


def train(kind: str, wrap: str, refuser: Refuser, rank: int, folder: Path | None = None, **options: Any) -> Any:
    model, windows = WRAPPED[wrap](build()), [take_mine(window, rank) for window in make_windows()]
    optimizer = OPTIMIZERS[kind](model.parameters())
    recovery = Recovery(
        model, optimizer, micro_batch_size=2, max_grad_norm=1.0, form=FORM, folder=folder, **options
    )  # fmt: skip
    with CappedMemory(ROOMY, refuse=refuser):
        for window in windows:
            recovery.step(window)
    return read_whole(model), count_steps(optimizer), recovery


def check_points(rank: int, wrap: str, num_points: int) -> None:
    """One rank is refused an allocation, each in turn; both end with the weights of the undisturbed run."""
    truth, steps = train_undisturbed("adamw-foreach")
    counter = Refuser()
    weights, _, _ = train("adamw-foreach", wrap, counter, rank)
    assert differ(weights, truth) <= SAME
    most = torch.tensor(counter.seen)
    dist.all_reduce(most, dist.ReduceOp.MIN)
    for number in range(num_points):
        point, refused = (2 * number + 1) * int(most) // (2 * num_points), number % 2
        weights, taken, recovery = train("adamw-foreach", wrap, Refuser(point if rank == refused else None), rank)
        assert differ(weights, truth) <= SAME, (point, differ(weights, truth))
        assert taken == steps
        if rank == refused:
            assert [event.own for event in recovery.events] == [True], point


def check_resume(rank: int, folder: str, hangs: bool) -> None:
    """A rank is lost in its second step, where the other waits for it; or the run that was restarted goes on."""
    truth, _ = train_undisturbed("adamw-foreach")
    model, windows = shard(build()), [take_mine(window, rank) for window in make_windows()]
    optimizer = OPTIMIZERS["adamw-foreach"](model.parameters())

    def find_loss(inputs: Any) -> Tensor:
        if hangs and rank == 0 and recovery.num_steps == 1:
            time.sleep(600)
        return model(**inputs).loss

    recovery = Recovery(
        model, optimizer, micro_batch_size=2, max_grad_norm=1.0, form=FORM, loss=find_loss, folder=folder,
        timeout_seconds=8.0,
    )  # fmt: skip
    taken = recovery.resume()
    assert taken == (0 if hangs else 1)
    for window in windows[taken:]:
        recovery.step(window)
    assert differ(read_whole(model), truth) <= SAME
    assert recovery.micro_batch_size == 1


def check_overlap(rank: int) -> None:
    """With room to spare DDP reduces in the last backward; until that began, everything can still be taken back."""
    truth, _ = train_undisturbed("adamw-foreach")
    for point in (None, 20):
        weights, _, recovery = train("adamw-foreach", "ddp", Refuser(point if rank else None), rank, overlap=True)
        assert differ(weights, truth) <= SAME
        assert len(recovery.events) == (point is not None)
        assert recovery._ladder.overlap == (point is None)


def check_trainer(rank: int, kind: str, folder: str) -> None:
    """Hugging Face's loop under DDP; DPO gathers metrics in the middle of each micro-batch, which ask as well."""
    from test_recover_trainer import make_trainer, train
    from test_recover_trl import prepare

    import brim

    def run(refuser: Refuser) -> Any:
        place = Path(folder, str(rank))
        trainer = prepare(kind, place) if kind != "hf" else brim.guard(make_trainer(place))
        return train(trainer, refuser, first=1)[0]

    counter = Refuser()
    quiet = run(counter)
    truth = read_whole(quiet.model)
    for point in (counter.seen // 8, counter.seen // 2) if kind == "hf" else (counter.seen // 4,):
        trainer = run(Refuser(point if rank else None))
        assert differ(read_whole(trainer.model), truth) <= SAME
        assert [event.own for event in trainer.recovery_events] == [bool(rank)]
        assert trainer.state.global_step == quiet.state.global_step


def sweep_from_benchmark(rank: int, wrap: str, points: int, out: str) -> None:
    """Run the sweep of benchmarks/recover_points.py in this rank."""
    from recover_points import sweep_rank

    sweep_rank(rank, wrap, points, out)


def naive_ddp(rank: int, failed: str) -> None:
    """What fails: each rank catches its own error, then flags are reduced over the group that gradients use."""
    model = DistributedDataParallel(build(), bucket_cap_mb=0.001)
    window = take_mine(make_windows()[0], rank)
    if rank == 0:  # in the middle of backward: some buckets are reduced, others never will be
        layer = model.module.model.layers[0].self_attn.q_proj.weight
        layer.register_hook(lambda grad: (_ for _ in ()).throw(torch.OutOfMemoryError("refused")))
    flag = torch.zeros(1)
    try:
        model(**window).loss.backward()
    except torch.OutOfMemoryError:
        flag += 1
        Path(failed).touch()
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    assert flag == 1
    model(**{key: value[:1] for key, value in window.items()}).loss.backward()
    dist.barrier()


def naive_fsdp2(rank: int, failed: str) -> None:
    """What hangs: the rank that failed waits for a flag, the other for its part of a layer's weights."""
    model = shard(build())
    window = take_mine(make_windows()[0], rank)
    if rank == 0:
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    flag = torch.zeros(1)
    try:
        model(**window).loss.backward()
    except torch.OutOfMemoryError:
        flag += 1
        Path(failed).touch()
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    assert flag == 1
    dist.barrier()


def run_rank(rank: int, port: int, work: str, arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    globals()[work](rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def spawn(work: str, *arguments: Any, seconds: float = SECONDS, failed: Path | None = None) -> list[int | None]:
    """Run two ranks; return their exit codes, None for one that had to be ended.

    Where a file says that a rank has failed, the time left from then on is a few seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, port, work, arguments)) for rank in range(2)]
    for one in ranks:
        one.start()
    until = time.monotonic() + seconds
    while failed is not None and not failed.exists() and time.monotonic() < until:
        time.sleep(0.1)
    until = min(until, time.monotonic() + 6.0) if failed is not None else until
    for one in ranks:
        one.join(max(until - time.monotonic(), 0.1))
    codes = [one.exitcode for one in ranks]
    for one in ranks:
        if one.is_alive():
            one.kill()
            one.join()
    return codes


@pytest.mark.parametrize("wrap", WRAPPED)
def test_weights_are_those_of_an_undisturbed_run(wrap: str) -> None:
    assert spawn("check_points", wrap, 3) == [0, 0]


@pytest.mark.slow
def test_overlap_is_kept_until_memory_runs_out() -> None:
    assert spawn("check_overlap") == [0, 0]


@pytest.mark.parametrize("kind", ["hf", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sft", "dpo"))])
def test_trainers_survive_on_two_ranks(kind: str, tmp_path: Path) -> None:
    assert spawn("check_trainer", kind, str(tmp_path), seconds=500.0) == [0, 0]


@pytest.mark.parametrize("work", ["naive_ddp", "naive_fsdp2"])
def test_the_naive_way_aborts_or_hangs(work: str, tmp_path: Path) -> None:
    codes = spawn(work, str(tmp_path / "failed"), failed=tmp_path / "failed")
    print(codes)
    assert codes[0] != 0 and codes[1] != 0


@pytest.mark.slow
def test_a_hang_ends_in_bounded_time_and_the_run_goes_on(tmp_path: Path) -> None:
    began = time.monotonic()
    assert spawn("check_resume", str(tmp_path), True, seconds=60.0) == [EXIT_CODE, EXIT_CODE]
    assert time.monotonic() - began < 60
    assert read_record(tmp_path)["micro_batch_size"] == 1
    assert spawn("check_resume", str(tmp_path), False) == [0, 0]

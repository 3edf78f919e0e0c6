"""An out-of-memory on one of two ranks, over gloo: no rank is left alone in a collective, and none aborts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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
from two_ranks import run_both, run_checks

from brim.devices.capped import CappedMemory
from brim.runtime.recover import Recovery
from brim.runtime.restore import is_sharded

KIND = "adamw-foreach"
SECONDS = 400.0


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


def prepare(wrap: str, **options: Any) -> Recovery:
    model = WRAPPED[wrap](build())
    said = {"micro_batch_size": 2, "max_grad_norm": 1.0, "form": FORM, **options}
    return Recovery(model, OPTIMIZERS[KIND](model.parameters()), **said)


def train(wrap: str, refuser: Refuser, rank: int, **options: Any) -> Any:
    """Train on windows that ranks share; return whole weights, steps taken, and the recovery."""
    recovery, windows = prepare(wrap, **options), [take_mine(window, rank) for window in make_windows()]
    with CappedMemory(ROOMY, refuse=refuser):
        for window in windows:
            recovery.step(window)
    return read_whole(recovery.model), count_steps(recovery.optimizer), recovery


def check_points(rank: int, wrap: str, num_points: int) -> None:
    """One rank is refused an allocation, each in turn; both end with the weights of the undisturbed run."""
    truth, steps = train_undisturbed(KIND)
    counter = Refuser()
    weights, _, _ = train(wrap, counter, rank)
    assert differ(weights, truth) <= SAME
    most = torch.tensor(counter.seen)
    dist.all_reduce(most, dist.ReduceOp.MIN)
    for number in range(num_points):
        point, refused = (2 * number + 1) * int(most) // (2 * num_points), number % 2
        weights, taken, recovery = train(wrap, Refuser(point if rank == refused else None), rank)
        assert differ(weights, truth) <= SAME, (point, differ(weights, truth))
        assert taken == steps
        if rank == refused:
            assert [event.own for event in recovery.events] == [True], point


def check_overlap(rank: int) -> None:
    """With room to spare DDP reduces in the last backward; until that began, everything can still be taken back."""
    truth, _ = train_undisturbed(KIND)
    for point in (None, 20):
        weights, _, recovery = train("ddp", Refuser(point if rank else None), rank, overlap=True)
        assert differ(weights, truth) <= SAME
        assert len(recovery.events) == (point is not None)
        assert recovery._ladder.overlap == (point is None)


def check_growth(rank: int, wrap: str) -> None:
    """Both ranks come down together and grow together, never beyond what was planned."""
    truth, _ = train_undisturbed(KIND)
    recovery, (first, second) = prepare(wrap), [take_mine(window, rank) for window in make_windows()]
    seen: list[int] = []
    recovery.model.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
    with CappedMemory(ROOMY, refuse=Refuser(20 if rank else None)):
        recovery.step(first)
    assert recovery.micro_batch_size == 1
    recovery.grow(8)
    assert recovery.micro_batch_size == 2
    seen.clear()
    recovery.step(second)
    assert seen == ([2, 2, 1] if rank else [2, 1, 1])  # the rank with fewer pieces repeats its last
    assert differ(read_whole(recovery.model), truth) <= SAME


def check_clipping(rank: int) -> None:
    """Sharded norms are summed over ranks in the middle of clipping, and one rank fails before it gets there."""
    truth, _ = train_undisturbed(KIND)
    theirs, calls = nn.utils.clip_grad_norm_, []

    def clip(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if rank and len(calls) == 1:
            raise torch.OutOfMemoryError("refused")
        return theirs(*args, **kwargs)

    nn.utils.clip_grad_norm_ = clip
    weights, _, recovery = train("fsdp2", Refuser(), rank)
    nn.utils.clip_grad_norm_ = theirs
    assert differ(weights, truth) <= SAME
    assert [event.own for event in recovery.events] == [bool(rank)]


def check_second_recovery(rank: int) -> None:
    """A model that another recovery has held asks the one that holds it now."""
    recovery = prepare("fsdp2")
    later = Recovery(recovery.model, recovery.optimizer, micro_batch_size=2, form=FORM)
    window = take_mine(make_windows()[0], rank)
    with CappedMemory(ROOMY, refuse=Refuser(40 if rank else None)):
        later.step(window)
    assert [event.own for event in later.events] == [bool(rank)]


def make_guarded(kind: str, place: Path) -> Any:
    from test_recover_trainer import make_trainer

    import brim

    if kind in ("hf", "hf-fsdp2"):
        return brim.guard(make_trainer(place), recover=True)
    from test_recover_trl import prepare as prepare_trl

    return prepare_trl(kind, place)


def check_trainer(rank: int, kind: str, folder: str, parts: tuple[int, ...]) -> None:
    """Hugging Face's loop; DPO gathers metrics in the middle of each micro-batch, which ask as well."""
    from test_recover_trainer import train as run_loop

    from brim.checks.fsdp2 import sharding_on_cpu

    def run(refuser: Refuser) -> Any:
        trainer = make_guarded(kind, Path(folder, str(rank)))
        sharded = kind.endswith("fsdp2")
        with sharding_on_cpu(trainer.accelerator, trainer.model) if sharded else nullcontext():
            trainer = run_loop(trainer, refuser, first=1)[0]
        assert is_sharded(trainer.model_wrapped) == sharded
        return trainer

    counter = Refuser()
    quiet = run(counter)
    truth = read_whole(quiet.model)
    for part in parts:
        trainer = run(Refuser(part * counter.seen // 8 if rank else None))
        assert differ(read_whole(trainer.model), truth) <= SAME
        own = [event.own for event in trainer.recovery_events]
        assert own == [True] if rank else not any(own)  # what was put back inside a step is told to nobody
        assert trainer.state.global_step == quiet.state.global_step


def sweep_from_benchmark(rank: int, wrap: str, points: int, out: str) -> None:
    """Run the sweep of benchmarks/recover_points.py in this rank."""
    from recover_points import sweep_rank

    sweep_rank(rank, wrap, points, out)


def run_rank(rank: int, port: int, checks: list[Callable[[int], None]]) -> None:
    run_checks(rank, port, checks)


def spawn(*checks: Callable[[int], None], seconds: float = SECONDS) -> None:
    run_both(partial(run_rank, checks=list(checks)), seconds)


def test_one_rank_out_of_memory_and_both_end_as_if_undisturbed() -> None:
    spawn(
        partial(check_points, wrap="ddp", num_points=2), partial(check_points, wrap="fsdp2", num_points=2),
        partial(check_growth, wrap="fsdp2"), check_clipping, check_overlap,
    )  # fmt: skip


@pytest.mark.slow
def test_more_points_and_what_is_done_twice() -> None:
    spawn(
        partial(check_points, wrap="ddp", num_points=6), partial(check_points, wrap="fsdp2", num_points=6),
        partial(check_growth, wrap="ddp"), check_second_recovery,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "hf-fsdp2", "sft", "dpo"])
def test_trainers_survive_on_two_ranks(kind: str, tmp_path: Path) -> None:
    spawn(partial(check_trainer, kind=kind, folder=str(tmp_path), parts=(1, 4, 7) if kind.startswith("hf") else (2,)))

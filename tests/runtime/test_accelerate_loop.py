"""An ordinary Accelerate loop takes the big batch's steps, and without brim it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin
from runtime_toys import (
    EXACT,
    Recorder,
    build_llama,
    build_mixtral,
    differ,
    find_routed_truth,
    make_rows,
    stack,
    train_whole,
)
from torch.utils.data import DataLoader, IterableDataset

from brim.errors import InvalidInput
from brim.runtime.accelerate_loop import exact_accelerate

LENGTHS = (4, 12, 12, 5, 12, 3, 9, 7, 12, 4, 6)
SIZE, STEPS = 2, 3
WINDOWS = ((0, 6), (6, 11))


class Stream(IterableDataset):
    """Rows whose number nobody can ask for."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def run_loop(
    rows: Any, model: Any, *, exact: bool, epochs: int = 1, prepared: bool = True, **settings: Any
) -> tuple[Recorder, Any, list[bool]]:
    """Return the optimizer, the scheduler and when gradients were said to be reduced."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=STEPS, **settings)
    recorder = Recorder(model)
    loader = DataLoader(rows, batch_size=SIZE, collate_fn=stack)
    schedule = torch.optim.lr_scheduler.LambdaLR(recorder, lambda step: 1.0)
    model, optimizer, scheduler = accelerator.prepare(model, recorder, schedule)
    loader = accelerator.prepare(loader) if prepared else loader
    synced, backward = [], accelerator.backward
    with exact_accelerate(accelerator, model, loader) if exact else nullcontext(loader) as batches:
        for _ in range(epochs):
            for batch in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    synced.append(accelerator.sync_gradients)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
    assert accelerator.backward == backward and "_do_sync" not in vars(accelerator)
    assert len(accelerator.gradient_state.dataloader_references) == 1  # none is being read
    return recorder, schedule, synced


def find_truth(rows: Any, model: Any) -> list[Any]:
    return [train_whole(model, stack(rows[start:stop])) for start, stop in WINDOWS]


@pytest.mark.parametrize("unlabelled", [(), (2, 3), (6, 7, 8, 9, 10)])
@pytest.mark.parametrize("form", ["prepared", "plain", "stream"])
def test_steps_are_those_of_the_big_batch(form: str, unlabelled: tuple[int, ...]) -> None:
    rows, model = make_rows(LENGTHS, unlabelled=unlabelled), build_llama()
    truth = find_truth(rows, model)
    source = Stream(rows) if form == "stream" else rows
    recorder, schedule, synced = run_loop(source, model, exact=True, epochs=2, prepared=form != "plain")
    assert synced == [False, False, True] * 4
    assert len(recorder.seen) == 4 and schedule.last_epoch == 4
    for found, expected in zip(recorder.seen, truth * 2, strict=True):
        assert differ(found, expected) <= EXACT


def test_the_stock_loop_is_off() -> None:
    rows, model = make_rows(LENGTHS), build_llama()
    truth = find_truth(rows, model)
    recorder, _, _ = run_loop(rows, model, exact=False)
    assert all(differ(found, expected) > 0.02 for found, expected in zip(recorder.seen, truth, strict=True))


def test_auxiliary_losses_are_averaged_over_micro_batches() -> None:
    rows, model = make_rows(LENGTHS), build_mixtral()
    truth = [find_routed_truth(model, rows[start:stop], SIZE) for start, stop in WINDOWS]
    recorder, _, _ = run_loop(rows, model, exact=True)
    assert all(differ(found, expected) <= EXACT for found, expected in zip(recorder.seen, truth, strict=True))
    assert not model._forward_hooks


def test_bf16_autocast_is_measured_with_its_own_tolerance() -> None:
    rows, model = make_rows(LENGTHS), build_llama()
    truth = find_truth(rows, model)
    recorder, _, _ = run_loop(rows, model, exact=True, mixed_precision="bf16")
    assert all(differ(found, expected) < 3e-2 for found, expected in zip(recorder.seen, truth, strict=True))


def test_the_loader_seems_read_one_by_one() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=STEPS)
    model = build_llama()
    loader = accelerator.prepare(DataLoader(make_rows(LENGTHS), batch_size=SIZE, collate_fn=stack))
    with exact_accelerate(accelerator, model, loader) as batches:
        assert len(batches) == 6
        state = accelerator.gradient_state
        seen = [(state.end_of_dataloader, state.in_dataloader) for _ in batches]
    assert seen == [(False, True)] * 5 + [(True, True)]


def test_what_cannot_be_counted_is_refused() -> None:
    model, rows = build_llama(), make_rows(LENGTHS)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with exact_accelerate(accelerator, model, [tuple(rows[0].values())]) as batches, pytest.raises(InvalidInput):
        next(iter(batches))
    with exact_accelerate(accelerator, model, []) as batches, pytest.raises(InvalidInput, match="no micro-batch"):
        next(iter(batches))
    with (
        exact_accelerate(accelerator, model, []), pytest.raises(InvalidInput, match="already"),
        exact_accelerate(accelerator, model, []),
    ):  # fmt: skip
        pass
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    with pytest.raises(InvalidInput, match="epoch"), exact_accelerate(accelerator, model, []):
        pass

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from brim.spec.strategy import Strategy
from brim.trials.climb import climb
from brim.trials.ladder import Candidate, Ladder, Outcome

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIB = 1 << 30


def candidate(size: int, gib: float, seconds: float, checkpointing: str = "none") -> Candidate:
    strategy = Strategy(
        micro_batch_size=size, gradient_accumulation_steps=32 // size, activation_checkpointing=checkpointing
    )
    return Candidate(strategy=strategy, peak_bytes=int(gib * GIB), seconds=seconds)


LADDER = [candidate(size, 4 + size, 10 + 8 / size) for size in (1, 2, 4, 8, 16, 32)]


def run_as(memory: float, slow_above: int = 99) -> tuple[list[int], object]:
    """Climb to 20 GiB on a device that needs a multiple of what is predicted."""
    sizes: list[int] = []

    def run(strategy: Strategy) -> Outcome:
        size = strategy.micro_batch_size
        sizes.append(size)
        held = int((4 + size) * memory * GIB)
        if held > 20 * GIB:
            return Outcome(strategy=strategy, fits=False, died=True, problem="out of memory")
        seconds = (10 + 8 / size) * (1.3 if size > slow_above else 1)
        return Outcome(strategy=strategy, fits=True, peak_bytes=held, held_bytes=held, seconds=seconds)

    return sizes, climb(LADDER, run, 20 * GIB)


@pytest.mark.parametrize(("memory", "best"), [(1.0, 16), (1.5, 8), (0.5, 32), (2.4, 4)])
def test_finds_the_largest_that_fits_whatever_the_prediction_is_off_by(memory: float, best: int) -> None:
    sizes, found = run_as(memory)
    assert found.best is not None and found.best.strategy.micro_batch_size == best
    assert found.num_ooms <= 1
    assert len(sizes) == len(set(sizes)) <= 5  # nothing is run twice


def test_fastest_not_biggest() -> None:
    _, found = run_as(1.0, slow_above=4)
    assert found.best is not None and found.best.strategy.micro_batch_size == 4


def test_what_spills_or_retries_is_not_chosen() -> None:
    def run(strategy: Strategy) -> Outcome:
        size = strategy.micro_batch_size
        return Outcome(
            strategy=strategy, fits=size <= 2, problem="" if size <= 2 else "the allocator emptied its pool 3 times",
            peak_bytes=10 * GIB, held_bytes=10 * GIB, seconds=1 / size,
        )  # fmt: skip

    found = climb(LADDER, run, 20 * GIB)
    assert found.best is not None and found.best.strategy.micro_batch_size == 2


def test_nothing_fits_is_said_not_guessed() -> None:
    found = climb(LADDER, lambda one: Outcome(strategy=one, fits=False, died=True, problem="out of memory"), 20 * GIB)
    assert found.best is None and found.num_ooms <= 2


def test_what_ran_corrects_what_was_predicted() -> None:
    ladder = Ladder(LADDER)
    before = ladder.range_of(LADDER[3])
    assert before.low < LADDER[3].peak_bytes < before.high
    for place in (0, 2):
        one = LADDER[place]
        held = int(one.peak_bytes * 1.2)
        ladder.note(Outcome(strategy=one.strategy, fits=True, held_bytes=held, seconds=one.seconds * 2))
    after = ladder.range_of(LADDER[3])
    assert after.likely == pytest.approx(LADDER[3].peak_bytes * 1.2)
    assert after.high - after.low < (before.high - before.low) / 3
    assert ladder.seconds_of(LADDER[3]) == pytest.approx(LADDER[3].seconds * 2)


def test_fifty_simulated_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "devices"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from simulated import read_devices

    from searches import run_climb

    bills = [run_climb(device) for device in read_devices()]
    assert mean(bill.seconds for bill in bills) <= 3.0
    assert mean(bill.ooms for bill in bills) <= 0.1
    assert sum(bill.speed >= 0.999 for bill in bills) >= 48
    assert all(bill.keeps_batch for bill in bills)

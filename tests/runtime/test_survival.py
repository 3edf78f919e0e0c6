"""A run that survives an out-of-memory in smaller pieces: what follows is held against what is run then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from test_observe import PLAN, Toy  # noqa: E402
from watch_toys import LENGTH, make_batch, plan_job  # noqa: E402

import brim  # noqa: E402
from brim.api import load_run  # noqa: E402
from brim.runtime.forecast import Forecast  # noqa: E402
from brim.runtime.survival import Survival, follow, read_survival  # noqa: E402
from brim.units import MIB  # noqa: E402


class FakeLadder:
    """What recovery shows of itself."""

    def __init__(self, size: int | None = None) -> None:
        self.size, self.events = size, list[Any]()

    def survive(self, size: int | None, change: str = "micro-batch 2 -> 1") -> None:
        self.size = size
        self.events.append(SimpleNamespace(change=change))


def make_toy(ladder: FakeLadder, **said: Any) -> Toy:
    return Toy(survival=lambda: read_survival(ladder), **said)


@pytest.mark.parametrize("size", [None, 2])
def test_nothing_survived_is_nothing_said(size: int | None) -> None:
    toy = make_toy(FakeLadder(size))
    toy.steps(60)
    found = toy.watcher.finish()
    assert toy.codes == [] and found.strategy == PLAN.strategy and found.peak_allocated_bytes == 100 * MIB


def test_what_follows_is_compared_with_the_new_split(tmp_path: Path) -> None:
    ladder = FakeLadder()
    toy = make_toy(ladder, folder=tmp_path)
    toy.steps(12)
    ladder.survive(1)
    toy.meter.ooms, toy.meter.retries = 1, 3
    toy.step(peak=990 * MIB, seconds=30.0)  # the window that was run twice
    smaller = follow(PLAN.strategy, read_survival(ladder))
    assert (smaller.micro_batch_size, smaller.gradient_accumulation_steps) == (1, 4)
    peak = Forecast(PLAN, smaller).peak(LENGTH)
    assert peak is not None and peak < 95 * MIB
    toy.steps(50, peak=peak, seconds=1.5)  # smaller pieces are slower
    found = toy.watcher.finish()
    assert toy.codes == ["survived"]
    (verdict,) = toy.watcher.verdicts
    assert verdict.step == 13 and "micro-batch 1 x accumulation 4" in verdict.text
    assert found.strategy == smaller and found.fits and found.num_retries == 0
    assert found.peak_allocated_bytes == peak and found.longest_tokens == LENGTH
    record = load_run(tmp_path)
    assert record.expected is not None and record.expected.as_run_allocated_bytes == peak
    assert record.measured.num_ooms == 0 and record.measured.num_steps == 63


def test_each_survival_is_said() -> None:
    ladder = FakeLadder(8)
    toy = make_toy(ladder, plan=replace(plan_job(8, 1), budget_bytes=700 * MIB))
    toy.steps(3)
    for size in (4, 2):
        ladder.survive(size)
        toy.steps(20, peak=800 * MIB)
    assert [code for code in toy.codes if code in ("survived", "over_budget")] == ["survived", "over_budget"] * 2
    assert [one.facts["micro_batch_size"] for one in toy.watcher.verdicts if one.code == "survived"] == [4, 2]


def test_in_the_first_step_it_is_as_any_other() -> None:
    ladder = FakeLadder()
    ladder.survive(1)
    toy = make_toy(ladder)
    toy.meter.ooms = 1
    toy.step(peak=990 * MIB)
    toy.steps(20, peak=80 * MIB)
    assert "out_of_memory" not in toy.codes and toy.watcher.finish().peak_allocated_bytes == 80 * MIB


def test_a_split_that_was_kept_from_an_earlier_run_is_the_runs_own() -> None:
    toy = make_toy(FakeLadder(1))
    toy.steps(5)
    assert toy.codes == ["estimate_low"]  # 100 MiB are more than micro-batch 1 should take
    assert toy.watcher.finish().strategy.micro_batch_size == 1


def test_a_split_that_grows_again_is_measured_anew() -> None:
    ladder = FakeLadder(1)
    toy = make_toy(ladder)
    toy.steps(5, peak=20 * MIB)
    ladder.size = 2
    toy.steps(5)
    assert "survived" not in toy.codes
    found = toy.watcher.finish()
    assert found.strategy == PLAN.strategy and found.peak_allocated_bytes == 100 * MIB


def test_evaluation_that_ran_out_changes_no_split() -> None:
    ladder = FakeLadder(2)
    toy = make_toy(ladder)
    toy.steps(10)
    ladder.survive(2, "evaluation batch 8 -> 4, training as before")
    toy.meter.ooms = 1
    toy.steps(20)
    assert toy.codes == ["survived"] and toy.watcher.finish().strategy == PLAN.strategy


@pytest.mark.parametrize(("size", "found"), [(None, (5, 3)), (5, (5, 3)), (8, (5, 3)), (3, (3, 6)), (1, (1, 15))])
def test_pieces_of_a_micro_batch(size: int | None, found: tuple[int, int]) -> None:
    strategy = follow(plan_job(5, 3).strategy, Survival(micro_batch_size=size))
    assert (strategy.micro_batch_size, strategy.gradient_accumulation_steps) == found


def test_checkpointing_that_was_turned_on_is_followed() -> None:
    ladder = FakeLadder(1)
    ladder.survive(1, "activation checkpointing turned on")
    assert follow(PLAN.strategy, read_survival(ladder)).activation_checkpointing == "full"


def test_the_plain_loop_asks_the_recovery_it_is_given() -> None:
    recovery = SimpleNamespace(micro_batch_size=2, events=[])
    with brim.watch(PLAN, recovery=recovery, tell=lambda line: None) as w:
        for number in range(6):
            if number == 3:
                recovery.micro_batch_size = 1
                recovery.events.append("step 3: out of memory in backward; micro-batch 2 -> 1")
            w.step(inputs=make_batch(2, LENGTH))
    assert [one.code for one in w.verdicts] == ["survived"] and w.observation.strategy.micro_batch_size == 1
    assert "micro-batch 2 -> 1" in w.verdicts[0].text


def test_whoever_recovers_and_breaks_stops_nothing() -> None:
    toy = Toy(survival=lambda: 1 / 0)
    toy.steps(5)
    assert toy.watcher.finish().num_steps == 5
    assert sum("watching it failed" in line for line in toy.lines) == 1

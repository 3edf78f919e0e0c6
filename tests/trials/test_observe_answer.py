"""From an answer to what history keeps, and from ranks to the weakest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_job import make_plan

from brim.trials.observe import find_held, find_problem, observe, read_estimate, read_outcome, split_seconds
from brim.trials.ranks import find_weakest
from brim.trials.request import Answer
from brim.units import GIB, MIB

DONE = Answer(
    ending="done", device="cpu", peak_allocated_bytes=2 * MIB, peak_reserved_bytes=3 * MIB, device_bytes=4 * MIB,
    num_steps=4, longest_tokens=32, seconds={2: 1.0, 4: 1.6},
)  # fmt: skip


def test_a_step_is_split_by_two_lengths() -> None:
    assert split_seconds({2: 1.0, 4: 1.6}) == pytest.approx((0.4, 0.3))
    assert split_seconds({1: 0.5, 2: 1.0}) == pytest.approx((0.0, 0.5))
    assert split_seconds({2: 1.0, 4: 0.9}) == (None, None)
    assert split_seconds({2: 1.0}) == (None, None)


def test_an_observation_has_what_was_measured_beside_what_was_said(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, micro_batch_size=2)
    seen = observe(plan, DONE, GIB)
    assert seen.fits and seen.step_seconds == pytest.approx(0.4 + 4 * 0.3)
    assert seen.tokens_per_second == pytest.approx(8 * 32 / 1.6)
    assert seen.predicted is not None
    assert seen.predicted.peak_allocated_bytes == plan.estimate.peak_allocated_bytes
    half = observe(plan, replace(DONE, real_fraction=0.5), GIB)
    assert half.tokens_per_second == pytest.approx(seen.tokens_per_second / 2)  # type: ignore[operator]
    estimate = read_estimate(seen)
    assert estimate.source == "trial" and estimate.step_time is not None
    assert estimate.step_time.step_seconds == pytest.approx(1.6)


def test_what_does_not_fit() -> None:
    assert find_problem(DONE, 10 * MIB) == ""
    assert "2 allocator retries" in find_problem(replace(DONE, num_retries=2), 10 * MIB)
    assert find_problem(replace(DONE, ending="oom"), 10 * MIB) == "out of memory"
    assert "a plan may use 1.0 MiB" in find_problem(DONE, MIB)
    assert find_held(replace(DONE, peak_reserved_bytes=10 * MIB)) == 9 * MIB
    assert find_held(replace(DONE, peak_allocated_bytes=None)) is None


def test_a_run_that_died_has_no_figures(tmp_path: Path) -> None:
    died = Answer(ending="oom", device="cpu")
    seen = observe(make_plan(tmp_path), died, GIB)
    assert not seen.fits and seen.step_seconds is None and seen.tokens_per_second is None
    outcome = read_outcome(seen)
    assert outcome.died and outcome.held_bytes is None
    with pytest.raises(ValueError, match="died"):
        read_estimate(seen)


def test_the_weakest_rank_decides() -> None:
    slow = replace(DONE, peak_allocated_bytes=5 * MIB, seconds={2: 2.0, 4: 3.0}, num_retries=1)
    worst = find_weakest([DONE, slow])
    assert worst.peak_allocated_bytes == 5 * MIB and worst.seconds == {2: 2.0, 4: 3.0} and worst.num_retries == 1
    stopped, oom = Answer(ending="lost", problem="another rank has died"), Answer(ending="oom", problem="no room")
    assert find_weakest([DONE, stopped, oom]).ending == "oom"
    assert find_weakest([stopped, oom]).problem == "rank 1: no room"
    gone = Answer(ending="failed", problem="connection closed by peer")
    assert find_weakest([gone, oom]).ending == "oom" and find_weakest([gone, stopped]).ending == "failed"

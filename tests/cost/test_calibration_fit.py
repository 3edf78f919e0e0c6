"""What measured runs say of the formula: a known factor comes back, and its error is that on runs held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.api.jobs import read_job
from brim.cost.calibration import (
    SETTLED_RUNS,
    Formula,
    Pair,
    calibrated_margin_fraction,
    fit,
    fit_calibration,
    fit_helping,
    margin_fraction,
)
from brim.cost.correction import Calibration
from brim.cost.ledger import Estimate
from brim.planner.options import read_options
from brim.spec.observation import Observation, Prediction
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

GIB = 2**30
WORKLOAD = read_job("8B", read_options({"gpu": "rtx-4090", "method": "qlora"})).workload


def peak(workload: Workload, strategy: Strategy) -> int:
    return (4 * GIB + strategy.micro_batch_size * GIB) * workload.data.seq_len // 2048


def seconds(workload: Workload, strategy: Strategy) -> float:
    return 1.0 * strategy.micro_batch_size


def answer(workload: Workload, strategy: Strategy) -> Estimate:
    allocated = peak(workload, strategy)
    return Estimate(
        source="formula", moments=(), peak_allocated_bytes=allocated, peak_reserved_bytes=allocated + GIB,
        device_bytes=allocated + 2 * GIB, peak_moment="",
    )  # fmt: skip


FORMULA = Formula(peak=peak, seconds=seconds, estimate=answer)


def run(micro: int, factor: float = 1.0, **said: Any) -> Observation:
    strategy = Strategy(micro_batch_size=micro, gradient_accumulation_steps=1)
    facts: dict[str, Any] = {
        "kind": "trial", "workload": WORKLOAD, "strategy": strategy, "finished": "2026-03-01T12:00:00Z",
        "device": "NVIDIA GeForce RTX 4090", "capacity_bytes": 24 * GIB, "num_steps": 2, "fits": True,
        "peak_allocated_bytes": round(peak(WORKLOAD, strategy) * factor),
    }  # fmt: skip
    return Observation(**(facts | said))


def fit_runs(runs: Sequence[Observation]) -> Calibration | None:
    return fit_calibration(runs, FORMULA, device="rtx-4090", torch="2.6", trainer="trl", model_type="llama")


@given(st.floats(0.5, 2.0), st.integers(3, 12))
def test_a_known_factor_comes_back(factor: float, count: int) -> None:
    found = fit_runs([run(micro, factor) for micro in range(1, count + 1)])
    assert found is not None and found.allocated.num_runs == found.allocated.num_different == count
    assert found.allocated.factor == pytest.approx(factor, rel=1e-6)
    assert found.allocated.worst_error_fraction < 1e-6


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_are_not_used(count: int) -> None:
    assert fit_runs([run(micro, 1.2) for micro in range(1, count + 1)]) is None
    assert fit_runs([run(1, 1.2)] * 10) is None, "one way of running, ten times"


@given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=9))
def test_the_error_is_that_of_a_fit_to_the_others(ratios: list[float]) -> None:
    found = fit(Pair(way, 1.0, ratio) for way, ratio in enumerate(ratios))
    assert found is not None
    errors = []
    for index, ratio in enumerate(ratios):
        others = [math.log(one) for one in ratios[:index] + ratios[index + 1 :]]
        errors.append(math.exp(median(others)) / ratio - 1)
    assert found.median_error_fraction == pytest.approx(median(map(abs, errors)))
    assert found.worst_error_fraction == pytest.approx(max(map(abs, errors)))
    short = max(0.0, max(1 / (1 + error) - 1 for error in errors))
    assert found.worst_shortfall_fraction == pytest.approx(short)


def test_one_run_that_went_wrong_moves_nothing() -> None:
    honest = [run(micro, 1.1) for micro in (1, 2, 4, 8)]
    found = fit_runs([*honest, run(16, 3.0)])
    assert found is not None and found.allocated.factor == pytest.approx(1.1)
    assert found.allocated.worst_error_fraction > 0.5, "and it is not hidden"


def test_repetitions_are_one_vote_and_are_held_out_together() -> None:
    found = fit_runs([run(1, 2.0)] * 20 + [run(2, 1.1), run(4, 1.1), run(8, 1.1)])
    assert found is not None and found.allocated.factor == pytest.approx(1.1)
    assert (found.allocated.num_runs, found.allocated.num_different) == (23, 4)
    assert found.allocated.worst_error_fraction == pytest.approx(1 - 1.1 / 2.0)


@pytest.mark.parametrize("said", [
    {"fits": False}, {"peak_allocated_bytes": None}, {"num_retries": 1}, {"peak_allocated_bytes": 0},
])  # fmt: skip
def test_only_runs_that_fit_with_a_known_peak_teach_memory(said: dict[str, Any]) -> None:
    assert fit_runs([run(1), run(2), run(4, **said)]) is None
    assert fit_runs([run(1), run(2), run(4), run(8, **said)]) == fit_runs([run(1), run(2), run(4)])


def test_it_does_not_feed_on_itself() -> None:
    """Runs whose prediction was corrected already teach the same factor as ever."""
    bare = [run(micro, 1.2) for micro in (1, 2, 4)]
    said = [
        replace(one, predicted=Prediction(
            source="formula", peak_allocated_bytes=one.peak_allocated_bytes or 0, peak_reserved_bytes=1, device_bytes=1,
            step_seconds=1.0,
        ))
        for one in bare
    ]  # fmt: skip
    assert fit_runs(said) == fit_runs(bare)


def test_runs_are_asked_at_the_length_they_reached() -> None:
    """A watched run of data shorter than planned is no formula that was too high."""
    short = [
        run(micro, 1.0, longest_tokens=1024, peak_allocated_bytes=round(peak(WORKLOAD, run(micro).strategy) * 0.55))
        for micro in (1, 2, 4)
    ]
    found = fit_runs(short)
    assert found is not None and found.allocated.factor == pytest.approx(1.1)


def test_steps_that_were_shorter_than_planned_teach_no_time() -> None:
    def timed(factor: float, **said: Any) -> list[Observation]:
        return [run(micro, step_seconds=factor * micro, **said) for micro in (1, 2, 4)]

    trial, watched = fit_runs(timed(1.3)), fit_runs(timed(1.3, kind="watch"))
    assert trial is not None and trial.seconds is not None and trial.seconds.factor == pytest.approx(1.3)
    assert watched is not None and watched.seconds is None, "nobody said how much of it was padding"
    full = [replace(one, tokens_per_second=2048 / 1.3) for one in timed(1.3, kind="watch")]
    padded = [replace(one, tokens_per_second=1024 / 1.3) for one in timed(1.3)]
    known, unknown = fit_runs(full), fit_runs(padded)
    assert known is not None and known.seconds is not None
    assert unknown is not None and unknown.seconds is None


def test_what_is_beyond_the_peak_is_learned_too() -> None:
    runs = []
    for micro in (1, 2, 4):
        one = run(micro)
        reserved = (one.peak_allocated_bytes or 0) + 2 * GIB
        runs.append(replace(one, peak_reserved_bytes=reserved, device_bytes=reserved + 420 * 2**20 * 3))
    found = fit_runs(runs)
    assert found is not None and found.slack is not None and found.context is not None
    assert found.slack.factor == pytest.approx(2.0) and found.context.factor == pytest.approx(3.0)
    none = fit_runs([replace(one, peak_reserved_bytes=one.peak_allocated_bytes) for one in runs])
    assert none is not None and none.slack is None, "a device that reserves nothing beyond tells nothing"


def test_less_than_weights_and_states_is_no_measurement() -> None:
    formula = FORMULA._replace(certain=lambda workload, strategy: 4 * GIB)
    names = {"device": "", "torch": "", "trainer": "", "model_type": ""}
    runs = [run(micro, 0.5) for micro in (1, 2, 4, 8)]
    assert fit_calibration(runs, FORMULA, **names) is not None
    assert fit_calibration(runs, formula, **names) is None, "two of the four are below"


def test_noise_corrects_nothing() -> None:
    noise = [Pair(way, 1.0, ratio) for way, ratio in enumerate((0.5, 2.0, 1.01, 0.99))]
    assert fit(noise) is not None and fit_helping(noise) is None


def test_what_the_formula_cannot_answer_is_left_out() -> None:
    def refuse(workload: Workload, strategy: Strategy) -> int:
        if strategy.micro_batch_size == 2:
            raise ZeroDivisionError
        return peak(workload, strategy)

    formula = FORMULA._replace(peak=refuse)
    names = {"device": "", "torch": "", "trainer": "", "model_type": ""}
    assert fit_calibration([run(1), run(2), run(4)], formula, **names) is None
    assert fit_calibration([run(1), run(2), run(4), run(8)], formula, **names) is not None


@given(st.lists(st.floats(0.6, 1.6), min_size=3, max_size=12))
def test_a_factor_below_one_is_used_no_further_than_held_out_runs_allow(ratios: list[float]) -> None:
    found = fit(Pair(way, 1.0, ratio) for way, ratio in enumerate(ratios))
    assert found is not None
    used = found.applied_factor
    assert used == found.factor if found.factor >= 1 else found.factor <= used <= 1
    if found.factor < 1:
        assert used == pytest.approx(min(1.0, found.factor * (1 + found.worst_error_fraction)))
    assert used * (1 + found.margin_fraction) >= found.factor * (1 + found.worst_shortfall_fraction) - 1e-9
    assert found.scale(10**12) >= used * 10**12


def test_the_margin_is_the_held_out_one_when_runs_are_enough() -> None:
    few, many = (fit_runs([run(micro, 1.2) for micro in range(1, count + 1)]) for count in (3, SETTLED_RUNS))
    assert few is not None and many is not None
    assert calibrated_margin_fraction(few) == margin_fraction("formula") > 0
    assert calibrated_margin_fraction(many) == pytest.approx(0, abs=1e-6)
    wild = fit_runs([run(micro, 1.2 + 0.1 * (micro % 2)) for micro in range(1, 5)])
    assert wild is not None and calibrated_margin_fraction(wild) > 0.03

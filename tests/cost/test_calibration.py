"""Margins come from the generated record of past errors, and only misses on the low side count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from time_jobs import job, way

from brim.cost.calibration import find_accuracy, margin_bytes, margin_fraction
from brim.cost.estimate import estimate
from brim.tables.read import list_accuracy


@pytest.mark.parametrize("source", ["formula", "rule"])
def test_the_margin_is_the_recorded_shortfall(source: str) -> None:
    """The planner's margin is the 90th percentile of how far below the truth an answerer was, allocated."""
    row = find_accuracy(source)  # type: ignore[arg-type]
    assert row is not None and row in list_accuracy()
    assert margin_fraction(source) == row.shortfall_p90_fraction >= 0  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["trial"])
def test_no_record_no_margin(source: str) -> None:
    """An answerer that was never measured has no margin, and no record."""
    assert find_accuracy(source) is None and margin_fraction(source) == 0  # type: ignore[arg-type]


@given(st.integers(0, 2**40))
def test_margins_are_whole_bytes_rounded_up(peak_bytes: int) -> None:
    """A margin covers its share of the peak and less than a byte more."""
    beyond = margin_bytes("formula", peak_bytes) - margin_fraction("formula") * peak_bytes
    assert -1e-3 <= beyond < 1 + 1e-3


def test_estimates_carry_their_margin() -> None:
    """The estimate shows the margin on its own peak."""
    answer = estimate(job(), way())
    assert answer.margin_bytes == margin_bytes("formula", answer.peak_allocated_bytes)


def test_the_formula_is_known_better_than_the_rule() -> None:
    """The record has both, on both counters."""
    for meter in ("allocated", "device"):
        formula, rule = find_accuracy("formula", meter), find_accuracy("rule", meter)
        assert formula is not None and rule is not None
        assert formula.median_error_fraction < rule.median_error_fraction

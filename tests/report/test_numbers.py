"""Numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.report.numbers import (
    format_difference,
    format_gib,
    format_parameters,
    format_rounded,
    format_scaled,
    format_seconds,
    format_share,
)


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0423, "0.042 s"), (6.35, "6.3 s"), (85, "85 s"), (150, "2.5 min"), (5_400, "1.5 h"), (10_325, "2.9 h"),
    (172_800, "2 days"), (40_000_000, "463 days"),
])  # fmt: skip
def test_time_is_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_share_says_when_it_is_small_and_when_there_is_no_whole() -> None:
    assert [format_share(part, 200) for part in (0, 1, 2, 100)] == ["0 %", "<1 %", "1 %", "50 %"]
    assert format_share(1, 0) == "-"


def test_difference_is_signed() -> None:
    assert [format_difference(figure, 100) for figure in (48, 100, 140)] == ["-52 %", "+0 %", "+40 %"]
    assert format_difference(1, 0) == "-"


def test_counts_are_named_like_models() -> None:
    counts = (8_030_261_248, 124_439_808, 999_885_952, 1_026_000_000_000, 7)
    assert [format_parameters(number) for number in counts] == ["8.03B", "124M", "1B", "1.03T", "7"]


def test_a_rate_is_cut_to_three_digits_and_unknown_stays_unknown() -> None:
    assert format_rounded(10_346.7) == "10,300"
    assert [format_scaled(1.01e12, 1e9), format_scaled(None, 1e9)] == ["1,010", "-"]


@given(st.floats(min_value=0, max_value=1e12, allow_nan=False))
def test_every_number_has_a_text(number: float) -> None:
    for format_number in (format_seconds, format_rounded, format_gib):
        assert format_number(number)

"""Thinning keeps every peak and every border of phases, and invents nothing."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from brim.cost.timeline import Point, Timeline, find_peak, list_spans, thin_timeline


def make_timeline(levels: list[tuple[str, int]]) -> Timeline:
    reserved, points = 0, []
    for ordinal, (phase, level) in enumerate(levels):
        reserved = max(reserved, 2 * level)
        points.append(Point(ordinal=ordinal, phase=phase, row_bytes=(level, 7), reserved_bytes=reserved))
    return Timeline(rows=("parameters", "activations"), points=tuple(points))


LEVELS = st.lists(st.tuples(st.sampled_from(["forward", "loss", "backward"]), st.integers(0, 2**36)), max_size=400)


@settings(max_examples=150, deadline=None)
@given(levels=LEVELS, num_buckets=st.integers(0, 60))
def test_no_peak_and_no_border_is_lost(levels: list[tuple[str, int]], num_buckets: int) -> None:
    whole = make_timeline(levels)
    thin = thin_timeline(whole, num_buckets)
    assert find_peak(thin) == find_peak(whole)
    assert set(thin.points) <= set(whole.points)
    ordinals = [point.ordinal for point in thin.points]
    assert ordinals == sorted(set(ordinals))
    assert len(list_spans(thin)) == len(list_spans(whole))
    for one, other in zip(list_spans(whole), list_spans(thin), strict=True):
        before, after = whole.points[one.first : one.last + 1], thin.points[other.first : other.last + 1]
        assert (before[0], before[-1]) == (after[0], after[-1])
        assert max(point.allocated_bytes for point in before) == max(point.allocated_bytes for point in after)
        assert max(point.reserved_bytes for point in before) == max(point.reserved_bytes for point in after)


def test_long_phases_are_thinned_to_what_was_asked() -> None:
    whole = make_timeline([("forward", index % 97) for index in range(60_000)] + [("loss", 1000 + i) for i in range(9)])
    thin = thin_timeline(whole, 500)
    assert 400 <= len(thin.points) <= 560
    assert [span.last - span.first + 1 for span in list_spans(thin)][1] == 9  # a short phase stays whole


def test_few_points_stay_as_they_are() -> None:
    whole = make_timeline([("forward", 1), ("loss", 2)])
    assert thin_timeline(whole, 2) is whole


def test_a_phase_that_comes_back_is_another_span() -> None:
    whole = make_timeline([("forward", 1), ("forward", 2), ("loss", 2), ("forward", 3)])
    assert [(span.phase, span.first, span.last) for span in list_spans(whole)] == [
        ("forward", 0, 1), ("loss", 2, 2), ("forward", 3, 3),
    ]  # fmt: skip
    assert find_peak(whole) == whole.points[3]


def test_an_empty_timeline_has_no_peak() -> None:
    assert find_peak(make_timeline([])) is None
    assert list_spans(make_timeline([])) == ()

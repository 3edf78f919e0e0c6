"""Memory over a step, one point for each allocation and free: what is drawn, and how it is thinned for drawing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from brim.spec.model import STRICT

_LEAST_BUCKETS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Memory after one allocation or free, until the next one."""

    __pydantic_config__ = STRICT

    ordinal: int
    """Number of the allocation or free in the step, from 0."""
    phase: str
    """Phase of the step it happened in."""
    row_bytes: tuple[int, ...]
    """What every row of the timeline holds, bytes, in the timeline's order."""
    reserved_bytes: int
    """What the caching allocator holds, bytes."""

    @property
    def allocated_bytes(self) -> int:
        """Sum of all rows, bytes."""
        return sum(self.row_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Memory of one device over a step, in order of allocations."""

    __pydantic_config__ = STRICT

    rows: tuple[str, ...]
    """Names of ledger rows in the order they are stacked, the longest-lived first."""
    points: tuple[Point, ...]
    """One for each change of memory, in order."""
    capacity_bytes: int | None = None
    """What the process can get on the card, bytes; None if unknown."""
    budget_bytes: int | None = None
    """What the plan may use, bytes; None without a plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive points of one phase."""

    phase: str
    """Name of the phase."""
    first: int
    """Index of its first point."""
    last: int
    """Index of its last point."""


def find_peak(timeline: Timeline) -> Point | None:
    """Return the first of the points with the most allocated bytes; None of an empty timeline."""
    return max(timeline.points, key=lambda point: point.allocated_bytes, default=None)


def list_spans(timeline: Timeline) -> tuple[Span, ...]:
    """Return the phases in order of the step; one that comes back is another span."""
    points = timeline.points
    starts = [index for index, point in enumerate(points) if not index or points[index - 1].phase != point.phase]
    return tuple(
        Span(phase=points[first].phase, first=first, last=after - 1)
        for first, after in pairwise([*starts, len(points)])
    )


def thin_timeline(timeline: Timeline, num_buckets: int) -> Timeline:
    """Return the timeline with few enough points to draw, none of them invented.

    Each phase keeps its first and last point; the rest of it is cut into buckets, as many as its share of the points
    and no fewer than a short phase needs to be seen, and each keeps its highest point. So peaks of the step and of
    every phase, the most bytes reserved, and all borders of phases stay; dips between two kept points go.

    Args:
        timeline: any timeline.
        num_buckets: how many points to keep, about; short phases come on top.
    """
    if len(timeline.points) <= num_buckets:
        return timeline
    width = -(-len(timeline.points) // max(1, num_buckets))
    kept = sorted({index for span in list_spans(timeline) for index in _pick(timeline.points, span, width)})
    return replace(timeline, points=tuple(timeline.points[index] for index in kept))


def _pick(points: Sequence[Point], span: Span, width: int) -> Iterator[int]:
    """Yield indices of a phase's points to keep: its ends, and the highest of each bucket of `width` points."""
    yield span.first
    yield span.last
    yield max(range(span.first, span.last + 1), key=lambda index: points[index].reserved_bytes)
    width = max(1, min(width, (span.last - span.first + 1) // _LEAST_BUCKETS))
    for start in range(span.first, span.last + 1, width):
        yield max(range(start, min(start + width, span.last + 1)), key=lambda index: points[index].allocated_bytes)

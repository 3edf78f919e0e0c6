"""A timeline as a drawing: stacked areas over the allocations of a step, phases as bands. No script, no network.

The horizontal axis is the order of allocations, linear inside a phase; a phase of few allocations is drawn wider, or
the loss, where the peak often is, would be thinner than a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from brim.cost.timeline import Point, Span, Timeline, find_peak, list_spans, thin_timeline
from brim.report.svg import COLORS
from brim.units import GIB, format_size

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 1080, 460, 52, 8, 26, 74
_POINTS_DRAWN, _HOVER_STRIPS = 700, 180
_LEAST_BAND = 46
_HEADROOM = 1.06
_SMALL_USE = 0.3
_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
_MOST_TICKS = 7


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where things stand: bands of the phases across, bytes up."""

    spans: Sequence[Span]
    borders: Sequence[float]
    ordinals: Sequence[int]
    top_bytes: float

    def across(self, span: int, ordinal: int) -> float:
        """Return the position of a point of a span."""
        first, after = self.ordinals[span], self.ordinals[span + 1]
        left, right = self.borders[span], self.borders[span + 1]
        return left + (right - left) * (ordinal - first) / max(1, after - first)

    def up(self, num_bytes: float) -> float:
        """Return the height of bytes, in SVG's coordinates."""
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - num_bytes / self.top_bytes)


def draw_timeline(timeline: Timeline) -> str:
    """Return an SVG of a whole step: areas per ledger row, reserved bytes, capacity, phases, and the peak.

    Leaves out: dips between two drawn points; every peak is drawn.
    """
    peak = find_peak(timeline)
    if peak is None:
        return "<p>No allocation was recorded.</p>"
    thin = thin_timeline(timeline, _POINTS_DRAWN)
    frame = _make_frame(timeline, thin)
    places = [(span, point) for span, one in enumerate(frame.spans) for point in thin.points[one.first : one.last + 1]]
    parts = [
        *_draw_scale(frame), *_draw_bands(frame), *_draw_areas(frame, thin.rows, places),
        _draw_reserved(frame, places), *_draw_limits(frame, timeline), *_draw_hovers(frame, thin.rows, places),
        *_draw_peak(frame, peak, places),
    ]  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'style="width:100%;height:auto" font-size="12" fill="currentColor"><title>Memory over the step</title>'
        f"{''.join(parts)}</svg>"
    )


def _make_frame(whole: Timeline, thin: Timeline) -> _Frame:
    spans, ends = list_spans(thin), whole.points[-1].ordinal + 1
    ordinals = [thin.points[span.first].ordinal for span in spans] + [ends]
    widths = _share_width([after - first for first, after in pairwise(ordinals)])
    borders = [float(_LEFT)]
    for width in widths:
        borders.append(borders[-1] + width)
    return _Frame(spans, borders, ordinals, _choose_top(whole))


def _share_width(counts: Sequence[int]) -> list[float]:
    """Return a width for each phase: its share of the allocations, and never less than its name needs."""
    whole = _WIDTH - _LEFT - _RIGHT
    least = min(_LEAST_BAND, whole / len(counts) / 2)
    spare = whole - least * len(counts)
    return [least + spare * count / sum(counts) for count in counts]


def _choose_top(timeline: Timeline) -> float:
    """The card's capacity is the top, unless the step uses so little of it that nothing would be seen."""
    highest = max(max(point.reserved_bytes, point.allocated_bytes) for point in timeline.points)
    limit = timeline.capacity_bytes or 0
    return _HEADROOM * (limit if highest > _SMALL_USE * limit and limit > highest else highest)


def _draw_scale(frame: _Frame) -> Iterator[str]:
    unit = GIB if frame.top_bytes >= GIB else GIB / 1024
    most = frame.top_bytes / unit
    tick = next((one for one in _TICKS if most / one <= _MOST_TICKS), _TICKS[-1] * 10)
    if most <= 2:
        tick = 0.25  # type: ignore[assignment]
    for index in range(int(most / tick) + 1):
        top = frame.up(index * tick * unit)
        yield (
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{top:.1f}" y2="{top:.1f}" stroke="currentColor" '
            f'stroke-opacity="0.12"/><text x="{_LEFT - 6}" y="{top + 4:.1f}" text-anchor="end" fill-opacity="0.75">'
            f"{index * tick:g}</text>"
        )
    yield f'<text x="{_LEFT - 6}" y="{_TOP - 12}" text-anchor="end">{"GiB" if unit == GIB else "MiB"}</text>'


def _draw_bands(frame: _Frame) -> Iterator[str]:
    bottom = _HEIGHT - _BOTTOM
    for index, span in enumerate(frame.spans):
        left, right = frame.borders[index], frame.borders[index + 1]
        if index % 2:
            yield (
                f'<rect x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{bottom - _TOP}" '
                'fill="currentColor" fill-opacity="0.05"/>'
            )
        middle = (left + right) / 2
        yield (
            f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="currentColor" '
            f'stroke-opacity="0.5"/><text transform="translate({middle + 4:.1f} {bottom + 15}) rotate(-28)" '
            f'text-anchor="end">{escape(span.phase)}</text>'
        )


def _draw_areas(frame: _Frame, rows: Sequence[str], places: Sequence[tuple[int, Point]]) -> Iterator[str]:
    """Each row is drawn down to the axis, the topmost first: the next one covers what is below it."""
    for index in reversed(range(len(rows))):
        words = rows[index].replace("_", " ")
        path = _draw_steps(frame, places, lambda point, index=index: sum(point.row_bytes[: index + 1]))  # type: ignore[misc]
        bottom = _HEIGHT - _BOTTOM
        yield f'<path d="M{_LEFT} {bottom}{path}V{bottom}Z" fill="{COLORS[words]}"/>'


def _draw_reserved(frame: _Frame, places: Sequence[tuple[int, Point]]) -> str:
    path = _draw_steps(frame, places, lambda point: point.reserved_bytes)
    return (
        f'<path d="M{_LEFT} {frame.up(places[0][1].reserved_bytes):.1f}{path}" fill="none" stroke="currentColor" '
        'stroke-width="1.6"/>'
    )


def _draw_steps(frame: _Frame, places: Sequence[tuple[int, Point]], read: Callable[[Point], int]) -> str:
    """Return a path that holds every value until the next point, as memory does."""
    parts, level = [], ""
    for span, point in places:
        height = f"{frame.up(read(point)):.1f}"
        if height != level:
            parts.append(f"H{frame.across(span, point.ordinal):.1f}V{height}")
            level = height
    return "".join(parts) + f"H{_WIDTH - _RIGHT}"


def _draw_limits(frame: _Frame, timeline: Timeline) -> Iterator[str]:
    limits = (("capacity", timeline.capacity_bytes, ""), ("limit of the plan", timeline.budget_bytes, "5 4"))
    for words, size_bytes, dash in limits:
        if size_bytes is None:
            continue
        if size_bytes > frame.top_bytes:
            if not dash:
                text = f"{words} {format_size(size_bytes)}, above the drawing"
                yield f'<text x="{_WIDTH - _RIGHT}" y="{_TOP - 12}" text-anchor="end">{text}</text>'
            continue
        top = frame.up(size_bytes)
        yield (
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{top:.1f}" y2="{top:.1f}" stroke="currentColor" '
            f'stroke-opacity="0.75" stroke-dasharray="{dash}"/>'
            f'<text class="halo" x="{_WIDTH - _RIGHT - 4}" y="{top + (13 if dash else -4):.1f}" text-anchor="end">'
            f"{words} {format_size(size_bytes)}</text>"
        )


def _draw_hovers(frame: _Frame, rows: Sequence[str], places: Sequence[tuple[int, Point]]) -> Iterator[str]:
    """Invisible strips that tell the ledger at their highest point, as a tooltip."""
    height = _HEIGHT - _TOP - _BOTTOM
    width = -(-len(places) // _HOVER_STRIPS)
    for index, span in enumerate(frame.spans):
        for first in range(span.first, span.last + 1, width):
            last = min(first + width, span.last + 1)
            left = frame.across(index, places[first][1].ordinal)
            right = frame.across(index, places[last][1].ordinal) if last <= span.last else frame.borders[index + 1]
            highest = max((point for _, point in places[first:last]), key=lambda point: point.allocated_bytes)
            yield (
                f'<rect class="at" x="{left:.1f}" y="{_TOP}" width="{max(right - left, 0):.1f}" height="{height}">'
                f"<title>{escape(_describe(rows, highest))}</title></rect>"
            )


def _describe(rows: Sequence[str], point: Point) -> str:
    pairs = [(row.replace("_", " "), size) for row, size in zip(rows, point.row_bytes, strict=True) if size]
    lines = [f"{words} {format_size(size)}" for words, size in reversed(pairs)]
    head = f"{point.phase}: {format_size(point.allocated_bytes)}"
    return "\n".join([head, f"reserved {format_size(point.reserved_bytes)}", *lines])


def _draw_peak(frame: _Frame, peak: Point, places: Sequence[tuple[int, Point]]) -> Iterator[str]:
    span = next(span for span, point in places if point.ordinal == peak.ordinal)
    left, top = frame.across(span, peak.ordinal), frame.up(peak.allocated_bytes)
    above = frame.up(max(peak.allocated_bytes, peak.reserved_bytes)) - 9
    words = f"peak {format_size(peak.allocated_bytes)}, {peak.phase}"
    anchor, shift = ("end", 4) if left > _WIDTH / 2 else ("start", -4)
    yield (
        f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4.5" fill="none" stroke="currentColor" stroke-width="2"/>'
        f'<text class="halo" x="{left + shift:.1f}" y="{above:.1f}" text-anchor="{anchor}" font-weight="600">'
        f"{escape(words)}</text>"
    )

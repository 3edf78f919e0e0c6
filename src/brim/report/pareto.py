"""Memory against speed: every strategy of a trial as a point, on the terminal and as a drawing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from rich.measure import Measurement
from rich.text import Text

from brim.report.numbers import format_rounded
from brim.report.words import describe_strategy, list_varied
from brim.spec.strategy import Strategy
from brim.trials.record import Point, find_frontier
from brim.units import format_size

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

_COLUMNS, _ROWS = 64, 12
_MARKS = {"chosen": "◆", "measured": "●", "expected": "○", "over": "×"}
_ASCII_MARKS = {"chosen": "@", "measured": "*", "expected": "o", "over": "x"}
_ORDER = ("over", "expected", "measured", "chosen")
"""Later ones are drawn over earlier ones."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 380, 70, 20, 24, 48
_COLORS = {"chosen": "#228833", "measured": "#4477aa", "expected": "#4477aa", "over": "#cc3311"}


def find_kind(point: Point, chosen: Strategy | None) -> str:
    """Return what a point is shown as."""
    if point.strategy == chosen:
        return "chosen"
    if not point.fits:
        return "over"
    return "measured" if point.measured else "expected"


@dataclass(frozen=True, slots=True)
class Scatter:
    """Points on the terminal: memory to the right, tokens/s upwards; ASCII where the output knows no more."""

    points: Sequence[Point]
    chosen: Strategy | None
    budget_bytes: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Draw the axes, the limit, the points, and what the marks mean."""
        marks = _ASCII_MARKS if options.ascii_only else _MARKS
        bar, corner, floor = ("|", "+", "-") if options.ascii_only else ("│", "└", "─")
        shown = _list_shown(self.points, self.budget_bytes)
        if not shown:
            return
        most_bytes = max(*(point.peak_bytes for point in shown), self.budget_bytes)
        most_speed = max(point.tokens_per_second for point in shown)
        grid = self._fill(shown, marks, most_bytes, most_speed, bar)
        label = f"{format_rounded(most_speed)} tokens/s"
        yield Text(label, style="dim")
        for row in grid:
            yield Text(f"{bar}{''.join(row)}".rstrip(), no_wrap=True)
        yield Text(corner + floor * _COLUMNS, no_wrap=True)
        yield Text(f"0{format_size(most_bytes):>{_COLUMNS}}", style="dim", no_wrap=True)
        kinds = dict.fromkeys(find_kind(point, self.chosen) for point in shown)
        words = {"over": "over the limit", "expected": "expected from the runs"}
        said = [f"{marks[kind]} {words.get(kind, kind)}" for kind in reversed(_ORDER) if kind in kinds]
        yield Text(f"{'   '.join(said)}   {bar} limit {format_size(self.budget_bytes)}", style="dim")

    def _fill(
        self, shown: Sequence[Point], marks: dict[str, str], most_bytes: int, most_speed: float, bar: str
    ) -> list[list[str]]:
        grid = [[" "] * _COLUMNS for _ in range(_ROWS)]
        limit = min(round(self.budget_bytes / most_bytes * (_COLUMNS - 1)), _COLUMNS - 1)
        for row in grid:
            row[limit] = bar
        for kind in _ORDER:
            for point in shown:
                if find_kind(point, self.chosen) == kind:
                    column = round(point.peak_bytes / most_bytes * (_COLUMNS - 1))
                    row_number = round((1 - point.tokens_per_second / most_speed) * (_ROWS - 1))
                    grid[row_number][column] = marks[kind]
        return grid

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Return the fixed width of the drawing."""
        return Measurement(_COLUMNS + 2, _COLUMNS + 2)


def _list_shown(points: Sequence[Point], budget_bytes: int) -> list[Point]:
    """Return the points near the limit or below it: those far above would squeeze the others into a corner."""
    return [point for point in points if point.fits or point.peak_bytes <= 1.5 * budget_bytes]


def draw_pareto(points: Sequence[Point], chosen: Strategy | None, budget_bytes: int) -> str:
    """Return an SVG of the same points, the frontier as a line, each point with its strategy as a tooltip."""
    shown = _list_shown(points, budget_bytes)
    if not shown:
        return ""
    most_bytes = 1.05 * max(*(point.peak_bytes for point in shown), budget_bytes)
    most_speed = 1.08 * max(point.tokens_per_second for point in shown)
    knobs = list_varied([point.strategy for point in shown])

    def place(point: Point) -> tuple[float, float]:
        return _across(point.peak_bytes / most_bytes), _up(point.tokens_per_second / most_speed)

    parts = list(_draw_axes(most_bytes, most_speed, budget_bytes))
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, find_frontier(shown)))
    parts.append(f'<polyline points="{corners}" fill="none" stroke="#4477aa" stroke-width="1.5" stroke-opacity="0.6"/>')
    for kind in _ORDER:
        parts += [
            _draw_point(*place(point), kind, _describe(point, knobs)) for point in shown
            if find_kind(point, chosen) == kind
        ]  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'style="max-width:{_WIDTH}px;width:100%;height:auto" font-size="12" fill="currentColor">'
        f"<title>Memory against speed</title>{''.join(parts)}</svg>"
    )


def _across(share: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * share


def _up(share: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share


def _draw_axes(most_bytes: float, most_speed: float, budget_bytes: int) -> Iterator[str]:
    bottom, left = _up(0), _across(0)
    yield (
        f'<path d="M{left} {_TOP}V{bottom}H{_WIDTH - _RIGHT}" fill="none" stroke="currentColor" stroke-opacity="0.5"/>'
    )
    for share in (0.25, 0.5, 0.75, 1.0):
        speed, size_bytes = share * most_speed / 1.08, share * most_bytes / 1.05
        yield f'<text x="{left - 6}" y="{_up(share / 1.08) + 4:.1f}" text-anchor="end">{format_rounded(speed)}</text>'
        yield (
            f'<text x="{_across(share / 1.05):.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{format_size(int(size_bytes))}</text>"
        )
    yield f'<text x="{left}" y="{_TOP - 10}" text-anchor="start">tokens/s</text>'
    yield f'<text x="{_WIDTH - _RIGHT}" y="{bottom + 34}" text-anchor="end">peak of tensors</text>'
    limit = _across(budget_bytes / most_bytes)
    yield (
        f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{_TOP}" y2="{bottom}" stroke="#cc3311" stroke-dasharray="5 4"/>'
        f'<text x="{limit - 5:.1f}" y="{_TOP + 4}" text-anchor="end">limit {format_size(budget_bytes)}</text>'
    )


def _draw_point(x: float, y: float, kind: str, words: str) -> str:
    fill = "none" if kind == "expected" else _COLORS[kind]
    radius = 7 if kind == "chosen" else 4.5
    title = f"<title>{escape(words)}</title>"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{_COLORS[kind]}" stroke-width="1.5" '
        f'pointer-events="all">{title}</circle>'
    )


def _describe(point: Point, knobs: Sequence[str]) -> str:
    source = "measured" if point.measured else "expected"
    return (
        f"{describe_strategy(point.strategy, knobs)}: {format_size(point.peak_bytes)}, "
        f"{format_rounded(point.tokens_per_second)} tokens/s, {source}"
    )

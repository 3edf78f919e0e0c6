"""The ledger as a drawing: one stacked bar per moment, against the capacity. No script, no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from brim.cost.ledger import Estimate
from brim.report.memory import list_device_rows, list_rows
from brim.units import format_size

# Paul Tol's bright scheme and greys: told apart by colour-blind eyes, on white and on black.
COLORS = {
    "parameters": "#4477aa", "buffers": "#8a8fb8", "gradients": "#66ccee", "optimizer states": "#228833",
    "activations": "#ee6677", "temporaries": "#ccbb44", "communication": "#aa3377", "inputs": "#999933",
    "overhead": "#777777", "tensors": "#4477aa", "allocator slack": "#9a9a9a", "CUDA context": "#bdbdbd",
}  # fmt: skip
_WIDTH, _LABEL_WIDTH, _VALUE_WIDTH, _ROW_HEIGHT, _BAR_HEIGHT = 760, 200, 90, 26, 16


@dataclass(frozen=True, slots=True)
class _Scale:
    """Bytes to horizontal position."""

    whole_bytes: int

    def place(self, size_bytes: float) -> float:
        return _LABEL_WIDTH + (_WIDTH - _LABEL_WIDTH - _VALUE_WIDTH) * size_bytes / self.whole_bytes


def draw_moments(estimate: Estimate, *, capacity_bytes: int, budget_bytes: int, paged_bytes: int = 0) -> str:
    """Return an SVG: a stacked bar per moment, one for the whole card at the peak, and two lines for the limits."""
    bars = [(moment.name, list_rows(moment)) for moment in estimate.moments]
    bars.append(("card at the peak", list_device_rows(estimate, paged_bytes)))
    scale = _Scale(max(capacity_bytes, *(sum(size for _, size in rows) for _, rows in bars), 1))
    height = _ROW_HEIGHT * len(bars) + 24
    body = [part for index, (name, rows) in enumerate(bars) for part in _draw_bar(index, name, rows, scale)]
    body += _draw_limit(scale, capacity_bytes, height, f"capacity {format_size(capacity_bytes)}", dash="")
    body += _draw_limit(scale, budget_bytes, height, f"limit of the plan {format_size(budget_bytes)}", dash="4 3")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'style="max-width:{_WIDTH}px;width:100%;height:auto" font-size="12" fill="currentColor">'
        f"<title>Memory by moment</title>{''.join(body)}</svg>"
    )


def _draw_bar(index: int, name: str, rows: Sequence[tuple[str, int]], scale: _Scale) -> Iterator[str]:
    top, start_bytes = _ROW_HEIGHT * index + 4, 0
    yield f'<text x="{_LABEL_WIDTH - 8}" y="{top + 12}" text-anchor="end">{escape(_shorten(name))}</text>'
    for words, size_bytes in rows:
        left, right = scale.place(start_bytes), scale.place(start_bytes + size_bytes)
        yield (
            f'<rect x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="{_BAR_HEIGHT}" '
            f'fill="{COLORS.get(words, "#777777")}"><title>{escape(words)}: {format_size(size_bytes)}</title></rect>'
        )
        start_bytes += size_bytes
    yield f'<text x="{_WIDTH}" y="{top + 12}" text-anchor="end">{format_size(start_bytes)}</text>'


def _draw_limit(scale: _Scale, size_bytes: int, height: int, words: str, dash: str) -> Iterator[str]:
    left, bottom = scale.place(size_bytes), height - 20
    yield (
        f'<line x1="{left:.1f}" x2="{left:.1f}" y1="0" y2="{bottom}" stroke="currentColor" stroke-opacity="0.7" '
        f'stroke-dasharray="{dash}"><title>{escape(words)}</title></line>'
    )
    anchor, shift = ("end", -3) if dash else ("start", 3)
    yield (
        f'<text x="{left + shift:.1f}" y="{height - 7}" text-anchor="{anchor}" font-size="11" fill-opacity="0.75">'
        f"{escape(words.partition(' ')[0])}</text>"
    )


def _shorten(name: str, longest: int = 30) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"

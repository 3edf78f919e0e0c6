"""Memory over a step as one page: what is held after every allocation, phase by phase, against the card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from html import escape

from brim.cost.ledger import Estimate, HeldTensor, Ledger
from brim.cost.timeline import Timeline
from brim.report.area import draw_timeline
from brim.report.html import format_page, format_row, format_table
from brim.report.memory import list_rows
from brim.report.numbers import format_count, format_gib, format_share
from brim.report.svg import COLORS
from brim.units import format_size

_SHOWN_TENSORS = 20
_THINNEST = 1 / 500
_PAGE_STYLE = """
.brim-plan{max-width:1120px}
.brim-plan .legend span{margin-right:18px;white-space:nowrap}
.brim-plan .line{display:inline-block;width:16px;vertical-align:middle;margin-right:6px;border-top:2px solid}
.brim-plan .wide{overflow-x:auto}
.brim-plan code{font-size:12px}
.brim-plan .tensor td{white-space:nowrap}
.brim-plan .tensor td:last-child{white-space:normal;overflow-wrap:anywhere}
.brim-plan .halo{paint-order:stroke;stroke:Canvas;stroke-width:4px;stroke-linejoin:round}
.brim-plan .at{fill:transparent}
.brim-plan .at:hover{fill:currentColor;fill-opacity:.12}
"""


def timeline_page(timeline: Timeline, estimate: Estimate, title: str) -> str:
    """Return a self-contained page: the step's memory as stacked areas, its moments, and the largest tensors.

    No script, nothing fetched; light or dark as the reader's system is. Every text of the user is escaped.

    Args:
        timeline: memory after every allocation of the step.
        estimate: what the same trace answered.
        title: head of the page, one line.
    """
    parts = [
        f"<h2>{escape(title)}</h2>",
        _format_head(timeline, estimate),
        draw_timeline(timeline),
        _format_legend(timeline),
        _format_moments(estimate),
        _format_tensors(estimate.tensors, estimate.peak_allocated_bytes),
        _format_notes(estimate),
    ]
    return format_page(title, parts, _PAGE_STYLE)


def _format_head(timeline: Timeline, estimate: Estimate) -> str:
    lines = [
        f"Peak {format_size(estimate.peak_allocated_bytes)} allocated, {escape(estimate.peak_moment)}; "
        f"{format_size(estimate.peak_reserved_bytes)} reserved; {format_size(estimate.device_bytes)} on the device"
        + _compare_capacity(timeline, estimate),
        f"{format_count(len(timeline.points))} allocations and frees of two optimizer steps; nothing was run on a GPU",
    ]
    return f"<p>{lines[0]}</p><p class='dim'>{lines[1]}</p>"


def _compare_capacity(timeline: Timeline, estimate: Estimate) -> str:
    capacity = timeline.capacity_bytes
    if capacity is None:
        return ""
    return f", {format_share(estimate.device_bytes, capacity)} of {format_size(capacity)}"


def _format_legend(timeline: Timeline) -> str:
    highest = [max(held) for held in zip(*(point.row_bytes for point in timeline.points), strict=True)]
    seen = _THINNEST * max(highest, default=0)
    pairs = zip(timeline.rows, highest, strict=False)
    words = [row.replace("_", " ") for row, size_bytes in reversed(list(pairs)) if size_bytes > seen]
    keys = [f'<span><i class="key" style="background:{COLORS[word]}"></i>{word}</span>' for word in words]
    keys.append('<span><i class="line"></i>reserved by the allocator</span>')
    axis = "Across: allocations and frees in order, short phases drawn wider. Point at the drawing for its numbers."
    return f'<p class="legend">{"".join(keys)}</p><p class="dim">{axis}</p>'


def _format_moments(estimate: Estimate) -> str:
    seen = _THINNEST * estimate.peak_allocated_bytes
    held = {words for moment in estimate.moments for words, size_bytes in list_rows(moment) if size_bytes >= seen}
    columns = [words for words in (row.name.replace("_", " ") for row in fields(Ledger)) if words in held]
    rows = []
    for moment in estimate.moments:
        ledger = dict(list_rows(moment))
        sizes = [format_gib(ledger.get(words, 0)) for words in columns]
        style = "chosen" if moment.name == estimate.peak_moment else ""
        rows.append(format_row([escape(moment.name)], [format_gib(moment.total_bytes), *sizes], style=style))
    table = format_table(["highest point of"], ["total", *columns], rows)
    return f'<h4>Moments of the step, GiB</h4><div class="wide">{table}</div>'


def _format_tensors(tensors: Sequence[HeldTensor], peak_bytes: int) -> str:
    if not tensors:
        return ""
    rows = list(_format_tensor_rows(tensors[:_SHOWN_TENSORS], peak_bytes))
    table = format_table(["row"], ["GiB", "of the peak", "count"], rows, ["shape", "what"])
    return f'<h4>Largest tensors at the peak</h4><div class="wide">{table}</div>'


def _format_tensor_rows(tensors: Iterable[HeldTensor], peak_bytes: int) -> Iterator[str]:
    for one in tensors:
        words = one.row.replace("_", " ")
        key = f'<span class="key" style="background:{COLORS.get(words, "#777777")}"></span>{escape(words)}'
        shape = f"{' × '.join(map(str, one.shape)) or 'scalar'} {one.dtype}"
        yield format_row(
            [key], [format_gib(one.bytes), format_share(one.bytes, peak_bytes), format_count(one.count)],
            [escape(shape), _describe_origin(one)], style="tensor",
        )  # fmt: skip


def _describe_origin(tensor: HeldTensor) -> str:
    """Return parameter or module, then operator and line of code, as far as known."""
    where = f"<code>{escape(tensor.module)}</code> " if tensor.module else ""
    return where + f'<span class="dim">{escape(" at ".join(part for part in (tensor.op, tensor.line) if part))}</span>'


def _format_notes(estimate: Estimate) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in estimate.notes)
    return f"<details><summary>Assumed</summary><ul>{items}</ul></details>" if items else ""

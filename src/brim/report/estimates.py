"""Answers side by side: what each answerer says, row by row and moment by moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from brim.cost.ledger import Estimate, HeldTensor
from brim.report.memory import LEDGER_ROWS, find_peak, make_table
from brim.report.numbers import format_difference, format_gib, format_rounded, format_seconds
from brim.report.plan import describe_margin, format_list, format_section

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SHORT_ROWS = {
    "parameters": "params", "gradients": "grads", "optimizer_states": "optim", "activations": "activ",
    "temporaries": "temp", "communication": "comm",
}  # fmt: skip


def format_estimates(estimates: Sequence[Estimate], *, title: str = "", capacity_bytes: int | None = None) -> Group:
    """Return the answers side by side, then the ledger at each peak, then every moment.

    Args:
        estimates: one per answerer.
        title: what was asked, for the first line.
        capacity_bytes: bytes there are on the card; None if unknown.
    """
    parts: list[RenderableType] = [Text(title, style="bold")] if title else []
    parts += format_section("Answers (GiB)", _compare_totals(estimates, capacity_bytes))
    known = [estimate for estimate in estimates if find_peak(estimate) is not None]
    if known:
        parts += format_section("At the peak (GiB)", _compare_rows(known))
    for estimate in (row for row in known if len(row.moments) > 1):
        parts += format_section(f"Moment by moment (GiB), {estimate.source}", _format_moments(estimate))
    for estimate in (row for row in estimates if row.tensors):
        parts += format_section(f"Largest at the peak (GiB), {estimate.source}", _format_tensors(estimate.tensors))
    parts += format_section("How wrong", format_list(describe_margin(estimate) for estimate in estimates))
    notes = format_list(f"{row.source}: {'; '.join(row.notes)}" for row in estimates if row.notes)
    return Group(*parts, *format_section("Assumed", notes))


def _compare_totals(estimates: Sequence[Estimate], capacity_bytes: int | None) -> Table:
    sources = [estimate.source for estimate in estimates]
    last = [f"{sources[0]} vs {sources[-1]}"] if len(sources) > 1 else []
    table = make_table("", *sources, *last, right=[*sources, *last])
    for words, figures in _list_totals(estimates):
        difference = [format_difference(figures[0], figures[-1])] if last else []
        table.add_row(words, *(format_gib(figure) for figure in figures), *difference)
    if capacity_bytes is not None:
        table.add_row("free of the card", *(format_gib(capacity_bytes - row.device_bytes) for row in estimates))
    table.add_row("highest at", *(estimate.peak_moment or "-" for estimate in estimates))
    times = [estimate.step_time for estimate in estimates]
    if any(times):
        table.add_row("step", *(format_seconds(time.step_seconds) if time else "-" for time in times))
        rates = (format_rounded(time.tokens_per_second_per_device) if time else "-" for time in times)
        table.add_row("tokens/s per GPU", *rates)
    return table


def _list_totals(estimates: Sequence[Estimate]) -> Iterable[tuple[str, list[int]]]:
    yield "allocated at the peak", [estimate.peak_allocated_bytes for estimate in estimates]
    yield "reserved", [estimate.peak_reserved_bytes for estimate in estimates]
    yield "on the card (nvidia-smi)", [estimate.device_bytes for estimate in estimates]


def _compare_rows(estimates: Sequence[Estimate]) -> Table:
    sources = [estimate.source for estimate in estimates]
    table = make_table("row", *sources, right=sources)
    ledgers = [moment.ledger for moment in map(find_peak, estimates) if moment is not None]
    for row in (row for row in LEDGER_ROWS if any(getattr(ledger, row) for ledger in ledgers)):
        table.add_row(row.replace("_", " "), *(format_gib(getattr(ledger, row)) for ledger in ledgers))
    table.add_row("total", *(format_gib(ledger.total_bytes) for ledger in ledgers), style="bold")
    return table


def _format_tensors(tensors: Sequence[HeldTensor]) -> Table:
    heads = ("GiB", "how many")
    table = make_table(*heads, "shape", "dtype", "row", "what, and the line that made it", right=heads)
    for one in tensors:
        origin = f"{one.module or one.op}" + (f" ({one.line})" if one.line else "")
        shape = "x".join(map(str, one.shape))
        row = _SHORT_ROWS.get(one.row, one.row)
        table.add_row(format_gib(one.bytes), str(one.count), shape, one.dtype, row, origin)
    return table


def _format_moments(estimate: Estimate) -> Table:
    used = [row for row in LEDGER_ROWS if any(getattr(moment.ledger, row) for moment in estimate.moments)]
    heads = [_SHORT_ROWS.get(row, row) for row in used]
    table = make_table("moment", *heads, "total", right=[*heads, "total"])
    for moment in estimate.moments:
        cells = [format_gib(getattr(moment.ledger, row)) for row in used]
        style = "bold" if moment.name == estimate.peak_moment else None
        table.add_row(moment.name, *cells, format_gib(moment.total_bytes), style=style)
    return table

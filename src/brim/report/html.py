"""A plan as one piece of HTML for notebooks and pages: inline style and drawing, no script, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from brim.planner.paging import paged_bytes
from brim.planner.record import Plan
from brim.report.memory import PAGED_WORDS, list_device_rows
from brim.report.numbers import format_gib, format_share
from brim.report.plan import (
    describe_margin,
    describe_speed,
    describe_speed_source,
    format_verdict,
    is_fitting,
    list_paged,
    list_schedule,
)
from brim.report.svg import COLORS, draw_moments
from brim.report.words import describe_knobs, describe_strategy, describe_workload, list_varied
from brim.units import format_size

# Text and lines take the colour of the page around them, so that light and dark themes both work.
STYLE = """
.brim-plan{font-family:system-ui,sans-serif;font-size:14px;line-height:1.45;max-width:800px;color:inherit}
.brim-plan h3{font-size:17px;margin:0 0 4px}
.brim-plan h4{font-size:14px;margin:16px 0 4px}
.brim-plan p{margin:2px 0}
.brim-plan .dim{opacity:.72}
.brim-plan .fits{border-left:4px solid #228833;padding-left:10px}
.brim-plan .misfit{border-left:4px solid #cc3311;padding-left:10px}
.brim-plan table{border-collapse:collapse;margin:4px 0;border:0;font-size:13px}
.brim-plan tr,.brim-plan th,.brim-plan td{background:transparent!important;border:0}
.brim-plan th,.brim-plan td{padding:2px 14px 2px 0;text-align:left;vertical-align:top}
.brim-plan th{font-weight:600;border-bottom:1px solid color-mix(in srgb,currentColor 35%,transparent)}
.brim-plan td:first-child{white-space:nowrap}
.brim-plan .num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.brim-plan .key{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
.brim-plan .chosen td{font-weight:600}
.brim-plan ul{margin:2px 0;padding-left:20px}
.brim-plan summary{cursor:pointer;font-weight:600;margin-top:12px}
"""
_PAGE_STYLE = """
:root{color-scheme:light dark}
body{margin:0;background:Canvas;color:CanvasText}
.brim-plan{margin:0 auto;padding:24px}
.brim-plan h2{font-size:21px;margin:0 0 4px}
"""


def format_page(title: str, parts: Iterable[str], style: str = "") -> str:
    """Return a self-contained page of pieces of HTML, light or dark as the reader's system is.

    Args:
        title: of the window; escaped here.
        parts: what stands on it, one under another.
        style: rules of its own, beside those of every page.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_PAGE_STYLE}{style}</style></head>"
        f'<body><div class="brim-plan">{"".join(parts)}</div></body></html>'
    )


def format_plan_html(plan: Plan) -> str:
    """Return the plan as a self-contained HTML fragment; every text of the user is escaped."""
    parts = [
        f"<style>{STYLE}</style>",
        _format_head(plan),
        "<h4>Memory by moment</h4>",
        _draw(plan),
        _format_ledger(plan),
        _format_lines("Why", plan.reasons),
        _format_lines("Warnings", [warning.text for warning in plan.warnings]),
        _format_alternatives(plan) if plan.rejected else "",
        _format_details("Assumed", (*plan.assumptions, *plan.estimate.notes)),
        _format_details("Schedule", list_schedule(plan)),
    ]
    return f'<div class="brim-plan">{"".join(parts)}</div>'


def _draw(plan: Plan) -> str:
    return draw_moments(
        plan.estimate, capacity_bytes=plan.capacity_bytes, budget_bytes=plan.budget_bytes,
        paged_bytes=paged_bytes(plan.workload, plan.estimate),
    )  # fmt: skip


def _format_head(plan: Plan) -> str:
    used_bytes = plan.estimate.device_bytes - paged_bytes(plan.workload, plan.estimate)
    memory = (
        f"{format_size(used_bytes)} of {format_size(plan.capacity_bytes)} "
        f"({format_share(used_bytes, plan.capacity_bytes)})"
    )
    speed = describe_speed(plan) + (f"; {describe_speed_source(plan.estimate)}" if plan.estimate.step_time else "")
    lines = (describe_workload(plan.workload), describe_knobs(plan.strategy))
    memory = "; ".join((memory, *list_paged(plan), describe_margin(plan.estimate)))
    figures = (memory, speed)
    return (
        f'<div class="{"fits" if is_fitting(plan) else "misfit"}"><h3>{escape(format_verdict(plan))}</h3>'
        + "".join(f"<p>{escape(line)}</p>" for line in lines)
        + "".join(f'<p class="dim">{escape(line)}</p>' for line in figures)
        + "</div>"
    )


def _format_ledger(plan: Plan) -> str:
    rows = []
    paged = paged_bytes(plan.workload, plan.estimate)
    beside = [(PAGED_WORDS, paged)] if paged else []
    for words, size_bytes in (*list_device_rows(plan.estimate, paged), *beside):
        key = f'<span class="key" style="background:{COLORS.get(words, "#777777")}"></span>{escape(words)}'
        rows.append(format_row([key], [format_gib(size_bytes), format_share(size_bytes, plan.capacity_bytes)]))
    moment = f"At the peak ({plan.estimate.peak_moment})" if plan.estimate.moments else "At the peak"
    return format_table([escape(moment)], ["GiB", "of the card"], rows)


def _format_alternatives(plan: Plan) -> str:
    knobs = list_varied([plan.strategy, *(row.strategy for row in plan.rejected)])
    chosen = format_gib(plan.estimate.peak_allocated_bytes)
    words = escape(describe_strategy(plan.strategy, knobs))
    rows = [format_row([words], [chosen, "1.00x"], ["chosen"], style="chosen")]
    for row in plan.rejected:
        time = "-" if row.relative_step_time is None else f"{row.relative_step_time:.2f}x"
        words = escape(describe_strategy(row.strategy, knobs))
        rows.append(format_row([words], [format_gib(row.peak_allocated_bytes), time], [escape(row.reason)]))
    table = format_table(["strategy"], ["peak GiB", "step time"], rows, ["why not"])
    return f"<h4>Alternatives</h4>{table}"


def format_table(left: Sequence[str], right: Sequence[str], rows: Iterable[str], last: Sequence[str] = ()) -> str:
    """Return a table of rows made by `format_row` under heads: words, then numbers, then further words."""
    heads = [f"<th>{head}</th>" for head in left] + [f'<th class="num">{head}</th>' for head in right]
    heads += [f"<th>{head}</th>" for head in last]
    return f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def format_row(left: Sequence[str], right: Sequence[str], last: Sequence[str] = (), style: str = "") -> str:
    """Return one row of a table: cells of HTML on the left, numbers to the right, further cells last."""
    cells = [f"<td>{cell}</td>" for cell in left] + [f'<td class="num">{cell}</td>' for cell in right]
    cells += [f"<td>{cell}</td>" for cell in last]
    return f'<tr class="{style}">{"".join(cells)}</tr>'


def _format_lines(title: str, lines: Sequence[str]) -> str:
    return f"<h4>{title}</h4>{_format_items(lines)}" if lines else ""


def _format_details(title: str, lines: Sequence[str]) -> str:
    return f"<details><summary>{title}</summary>{_format_items(lines)}</details>" if lines else ""


def _format_items(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"

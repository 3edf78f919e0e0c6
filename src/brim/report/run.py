"""A watched run on the terminal: what was predicted beside what was measured, and what was seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from brim.report.memory import make_table
from brim.report.numbers import (
    format_count,
    format_difference,
    format_gib,
    format_rounded,
    format_seconds,
    format_share,
)
from brim.report.plan import format_list, format_section
from brim.runtime.run_record import Measured, RunRecord
from brim.runtime.sight import Verdict
from brim.units import format_size

if TYPE_CHECKING:
    from rich.table import Table

_STATES = {"running": "Running, or cut off", "ended": "Ended", "died": "Died"}
_STYLES = {"danger": "bold red", "warning": "bold yellow", "note": "bold"}


def format_run(record: RunRecord) -> Group:
    """Return a watched run as text: state, predicted beside measured, verdicts."""
    troubled = record.state == "died" or any(verdict.severity == "danger" for verdict in record.verdicts)
    parts = [
        Text(_describe_state(record), style="bold red" if troubled else "bold green"),
        *format_section("Predicted and measured", _compare(record)),
        *format_section("Lengths", format_list(_list_lengths(record))),
    ]
    for severity, title in (("danger", "Danger"), ("warning", "Warnings"), ("note", "Notes")):
        lines = [_describe_verdict(verdict) for verdict in record.verdicts if verdict.severity == severity]
        parts += format_section(title, format_list(lines), style=_STYLES[severity])
    return Group(*parts)


def _describe_state(record: RunRecord) -> str:
    measured = record.measured
    steps = f"{format_count(measured.num_steps)} optimizer step{'s' if measured.num_steps != 1 else ''}"
    ranks = f" on {measured.num_ranks} ranks" if measured.num_ranks > 1 else ""
    card = f" of {format_size(measured.capacity_bytes)}" if measured.capacity_bytes else ""
    why = f": {record.problem}" if record.problem else ""
    return f"{_STATES[record.state]} after {steps}{ranks} on {measured.device}{card}{why}"


def _compare(record: RunRecord) -> Table:
    """Return one row per figure; the estimate as planned, and for what was run where that is known."""
    measured, expected = record.measured, record.expected
    table = make_table("", "planned", "as run", "measured", "off by", right=("planned", "as run", "measured", "off by"))
    said = expected.prediction if expected is not None else None
    asked = expected.as_run_allocated_bytes if expected is not None else None
    sizes = (
        ("tensors, GiB", said and said.peak_allocated_bytes, asked, measured.peak_allocated_bytes),
        ("cut-off step, GiB" if record.state == "died" else "evaluation, GiB", None, None, measured.aside_bytes),
        ("reserved, GiB", said and said.peak_reserved_bytes, None, measured.peak_reserved_bytes),
        ("device, GiB", said and said.device_bytes, None, measured.device_bytes),
    )
    for name, planned, as_run, found in sizes:
        if found is not None:
            table.add_row(name, *(_cell(size) for size in (planned, as_run, found)), _off(found, as_run or planned))
    seconds, as_run_seconds = said and said.step_seconds, expected and expected.as_run_seconds
    if measured.step_seconds is not None:
        cells = (format_seconds(one) if one else "-" for one in (seconds, as_run_seconds, measured.step_seconds))
        table.add_row("step", *cells, _off(measured.step_seconds, as_run_seconds or seconds))
    _add_tokens(table, measured, expected.tokens_per_second if expected is not None else None)
    return table


def _add_tokens(table: Table, measured: Measured, planned: float | None) -> None:
    if measured.tokens_per_second is not None:
        said, found = (format_rounded(one) if one else "-" for one in (planned, measured.tokens_per_second))
        table.add_row("real tokens/s", said, "-", found, _off(measured.tokens_per_second, planned))


def _cell(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_gib(size_bytes)


def _off(found: float, said: float | None) -> str:
    return format_difference(found, said) if said else "-"


def _list_lengths(record: RunRecord) -> list[str]:
    measured, expected = record.measured, record.expected
    lines = []
    if measured.longest_tokens is not None:
        planned = f", {format_count(expected.longest_tokens)} planned" if expected is not None else ""
        coming = f", {format_count(measured.coming_tokens)} to come" if measured.coming_tokens else ""
        lines.append(f"longest sequence so far {format_count(measured.longest_tokens)} tokens{planned}{coming}")
    if measured.padding_fraction is not None:
        lines.append(f"{format_share(measured.padding_fraction, 1)} of the tokens run are padding")
    return lines


def _describe_verdict(verdict: Verdict) -> str:
    return f"step {verdict.step}: {verdict.text}" if verdict.step else verdict.text

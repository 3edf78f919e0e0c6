"""The proof that a strategy changes nothing but memory and time, on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from brim.checks.neutrality import STATE_LIMIT, TOGETHER
from brim.checks.report import FP32_LIMIT, KnobResult, NeutralityReport
from brim.report.memory import make_table
from brim.report.plan import format_list, format_section

if TYPE_CHECKING:
    from rich.table import Table

_FORMS = (".1e", ".4g", ".1e")


def format_neutrality(report: NeutralityReport) -> Group:
    """Return the verdict, what belongs to the workload, every knob's error, and what was not checked."""
    failed = _pick(report, "belongs to the workload")
    unchecked = _pick(report, "not checked")
    parts = [_format_verdict(report)]
    if failed:
        lines = [*(_name(row, row.reason) for row in failed), "turn it off, or take it as a change of what is trained"]
        parts += format_section("Belongs to the workload", format_list(lines))
    checked = [row for row in report.knobs if row.verdict != "not checked"]
    if checked:
        parts += format_section("Knobs", _format_knobs(checked))
    if unchecked:
        parts += format_section("Not checked", format_list([_name(row, row.reason) for row in unchecked]))
    parts += format_section("How it was measured", format_list(_list_remarks(report)))
    return Group(*parts)


def _pick(report: NeutralityReport, verdict: str) -> list[KnobResult]:
    return [row for row in report.knobs if row.verdict == verdict]


def _format_verdict(report: NeutralityReport) -> Text:
    failed, unchecked, neutral = (
        _pick(report, verdict) for verdict in ("belongs to the workload", "not checked", "neutral")
    )
    if failed:
        worst = max(failed, key=lambda row: row.error or 0.0)
        size = "" if worst.error is None else f" by {100 * worst.error:.3g} %"
        return Text(f"Not neutral: {report.subject}; {_name(worst)} changes the gradient{size}", style="bold red")
    rest = f"; {_count(unchecked)} not checked" if unchecked else ""
    if neutral:
        worst_error = max(row.error or 0.0 for row in neutral)
        turned = [row for row in neutral if row.knob != TOGETHER]
        text = f"Neutral: {report.subject}; {_count(turned)} of the strategy within {worst_error:.1e} of the plain run"
        return Text(text + rest, style="bold green" if not unchecked else "bold")
    return Text(f"Nothing to prove: {report.subject} runs plainly" + rest, style="bold")


def _count(rows: Sequence[KnobResult]) -> str:
    return f"{len(rows)} knob" + ("" if len(rows) == 1 else "s")


def _name(row: KnobResult, reason: str = "") -> str:
    """Return a knob and what it is turned to, with what there is to say about it."""
    name = row.knob.replace("_", " ")
    text = f"all neutral ones together ({row.value.replace('_', ' ')})" if row.knob == TOGETHER else name
    text += "" if row.knob == TOGETHER or row.value == "yes" else f" {row.value}"
    return f"{text}: {reason}" if reason else text


def _format_knobs(rows: Sequence[KnobResult]) -> Table:
    table = make_table("knob", "value", "error", "norm", "1 - cosine", "verdict", right=("error", "norm", "1 - cosine"))
    for row in rows:
        together = row.knob == TOGETHER
        figures = (row.error, row.norm_ratio, None if row.cosine is None else max(1 - row.cosine, 0.0))
        shown = ["-" if one is None else f"{one:{form}}" for one, form in zip(figures, _FORMS, strict=True)]
        name = "neutral ones together" if together else row.knob.replace("_", " ")
        table.add_row(name, "" if together else row.value, *shown, row.verdict)
    return table


def _list_remarks(report: NeutralityReport) -> list[str]:
    """Return what the figures mean, and what ran in place of what."""
    checked = {row.knob: row for row in report.knobs if row.verdict == "neutral" and row.reason}
    remarks = [
        "plain run: eager attention, dense loss, padded, one rank, nothing recomputed or offloaded",
        f"error: norm of the gradient's difference over the plain run's; {report.precision} fails above {FP32_LIMIT:g}",
    ]
    if any(row.knob == "optimizer_kernel" and row.error is not None for row in report.knobs):
        remarks.append(f"optimizer kernel: how far four steps move the weights, beside the loop; limit {STATE_LIMIT:g}")
    remarks += [_name(row, row.reason) for row in checked.values()]
    copied = "on a small copy of the model class with its own loss, on the CPU, without adapters or quantised weights"
    return [*remarks, copied]

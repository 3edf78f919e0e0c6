"""The proof of accumulation on the terminal and as a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import log10
from string import ascii_lowercase
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from brim.checks.report import BF16_NOISE, FP32_LIMIT, AccumulationReport, SplitResult, without_numbers
from brim.report.memory import make_table
from brim.report.plan import format_list, format_section

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH, _LABEL, _ROW, _FLOOR = 720, 210, 22, -8.0


def format_accumulation(report: AccumulationReport) -> Group:
    """Return the verdict, the causes with the line that mends them, and the error of every split."""
    parts = [_format_verdict(report)]
    letters = dict(zip(report.causes, ascii_lowercase, strict=False))
    if report.causes:
        named = [f"{letter}: {cause}" for cause, letter in letters.items()]
        parts += format_section("Cause", format_list(named))
        parts += format_section("Fix", format_list([report.fix])) if report.fix else []
    parts += format_section("Splits", _format_splits(report.splits, letters))
    parts += format_section("How it was measured", format_list(_list_remarks(report)))
    return Group(*parts)


def _format_verdict(report: AccumulationReport) -> Text:
    worst = report.worst
    if report.exact:
        text = f"Exact: {report.subject}; every split within {worst.error:.1e} of the big batch's gradient"
        return Text(text, style="bold green")
    text = (
        f"Not exact: {report.subject}; micro-batch {worst.micro_batch_size} x accumulation "
        f"{worst.gradient_accumulation_steps} is {_percent(worst.error)} off, its norm {worst.norm_ratio:.3g} times"
    )
    return Text(text, style="bold red")


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %"


def _format_splits(splits: Sequence[SplitResult], letters: Mapping[str, str]) -> Table:
    heads = ("micro-batch", "accumulation", "ranks", "step", "error", "norm", "1 - cosine")
    table = make_table(*heads, "cause", right=heads)
    for split in splits:
        cause = letters.get(without_numbers(split.cause), "-")
        table.add_row(
            str(split.micro_batch_size), str(split.gradient_accumulation_steps), str(split.num_ranks),
            f"{split.window}" + (" (partial)" if _is_partial(split) else ""), f"{split.error:.1e}",
            f"{split.norm_ratio:.4g}", f"{max(1 - split.cosine, 0):.1e}", cause,
        )  # fmt: skip
    return table


def _is_partial(split: SplitResult) -> bool:
    return split.window > 0


def _list_remarks(report: AccumulationReport) -> list[str]:
    """Return what the figures mean, and what is not accumulation's doing."""
    remarks = [
        f"loss: {report.loss}, measured on the model, not read from its name",
        "truth: every sequence run alone and unpadded, weighted by what its loss averages over",
        f"error: norm of the difference over the norm of the truth; {report.precision} fails above {FP32_LIMIT:g}"
        if report.precision == "fp32"
        else "bf16 fails where the norm is 0.2 % off or 1 - cosine above 3e-4",
        f"on {report.size}: " + ", ".join(f"{k} {v}" for k, v in report.versions.items()),
    ]
    if report.padding_error > (FP32_LIMIT if report.precision == "fp32" else BF16_NOISE):
        remarks.append(
            f"a padded batch is {_percent(report.padding_error)} off its sequences run alone: the model sees padding"
        )
    if report.batch_error:
        remarks.append(
            "auxiliary losses are averaged over micro-batches and ranks, since they are not linear in the batch; one "
            f"batch of {report.splits[0].micro_batch_size} is {_percent(report.batch_error)} away from single sequences"
        )
    return remarks


def format_accumulation_html(report: AccumulationReport) -> str:
    """Return the proof as a self-contained HTML fragment for notebooks: verdict, causes, drawing, table."""
    heads = ("micro-batch", "accumulation", "ranks", "step", "error", "norm", "cause")
    rows = [
        (s.micro_batch_size, s.gradient_accumulation_steps, s.num_ranks, s.window, f"{s.error:.1e}",
         f"{s.norm_ratio:.4g}", s.cause or "-")
        for s in report.splits
    ]  # fmt: skip
    body = "".join("<tr>" + "".join(f"<td>{escape(str(one))}</td>" for one in row) + "</tr>" for row in rows)
    lines = [*report.causes, *([f"fix: {report.fix}"] if report.fix else []), *_list_remarks(report)]
    return (
        f"<div><p><b>{escape(_format_verdict(report).plain)}</b></p>{draw_errors(report)}"
        f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{body}</table>"
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul></div>"
    )


def draw_errors(report: AccumulationReport) -> str:
    """Return an SVG: the error of every split on a logarithmic scale, with the limit of fp32 as a line."""
    height = _ROW * len(report.splits) + 30
    bars = "".join(_draw_error(index, split) for index, split in enumerate(report.splits))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'style="max-width:{_WIDTH}px;width:100%;height:auto;font-family:system-ui,sans-serif" font-size="12" '
        f'fill="currentColor"><title>Error by split: {escape(report.subject)}</title>{bars}'
        f"{_draw_limit(height) if report.precision == 'fp32' else ''}</svg>"
    )


def _draw_limit(height: int) -> str:
    limit = _place(FP32_LIMIT)
    return (
        f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="0" y2="{height - 20}" stroke="currentColor" '
        f'stroke-dasharray="4 3"/><text x="{limit:.1f}" y="{height - 6}" text-anchor="middle">limit {FP32_LIMIT:g}'
        "</text>"
    )


def _draw_error(index: int, split: SplitResult) -> str:
    top = _ROW * index
    label = f"{split.micro_batch_size} x {split.gradient_accumulation_steps} x {split.num_ranks}, step {split.window}"
    color = "#cc3311" if split.cause else "#228833"
    return (
        f'<text x="{_LABEL - 8}" y="{top + 15}" text-anchor="end">{label}</text>'
        f'<rect x="{_LABEL}" y="{top + 4}" width="{max(_place(split.error) - _LABEL, 1):.1f}" height="14" '
        f'fill="{color}"><title>{split.error:.1e} {escape(split.cause)}</title></rect>'
    )


def _place(error: float) -> float:
    """Return where an error stands: 1e-8 at the left, 100 at the right."""
    power = min(max(log10(error) if error > 0 else _FLOOR, _FLOOR), 2.0)
    return _LABEL + (_WIDTH - _LABEL - 20) * (power - _FLOOR) / (2.0 - _FLOOR)

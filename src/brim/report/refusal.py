"""A job that does not fit: by how much, and what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from brim.errors import DoesNotFit
from brim.planner.record import Relaxation
from brim.report.memory import make_table
from brim.report.numbers import format_gib
from brim.report.plan import format_section
from brim.units import format_size


def format_does_not_fit(error: DoesNotFit) -> Group:
    """Return the verdict with the gap, and the changes that would close it, cheapest first."""
    verdict = f"Does not fit: {format_size(error.gap_bytes)} short at {error.at_moment}"
    body = _format_relaxations(error.relaxations) if error.relaxations else Text("no single change makes it fit")
    parts = format_section("What would fit (nothing was changed)", body)
    return Group(Text(verdict, style="bold red"), *parts)


def _format_relaxations(relaxations: Sequence[Relaxation]) -> Table:
    table = make_table(
        "change", "fits", "peak GiB", "what it does to the training", right=("peak GiB",), whole=("change",)
    )
    for row in relaxations:
        fits = Text("yes", style="green") if row.fits else Text("no", style="red")
        table.add_row(Text(row.change), fits, format_gib(row.peak_allocated_bytes), Text(row.effect))
    return table

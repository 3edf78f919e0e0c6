"""An export on the terminal: what was named how, and the line that starts the run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from brim.exporters.record import Export
from brim.report.commands import Commands
from brim.report.memory import make_grid
from brim.report.plan import format_list, format_section


def format_export(export: Export, *, next_commands: Sequence[str] = ()) -> Group:
    """Return the settings of an export, its files and notes, and what to type next."""
    settings = make_grid(2)
    for name, value in export.settings.items():
        settings.add_row(name, Text(str(value)))
    return Group(
        Text(f"{export.target}, for {export.dialect}", style="bold"),
        *format_section("Settings", settings),
        *format_section("Files", format_list(file.name for file in export.files)),
        *format_section("Notes", format_list(export.notes)),
        *format_section("Next", Commands(next_commands) if next_commands else None),
    )

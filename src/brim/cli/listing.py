"""What the verbs that list a table share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from brim.cli.output import print_json, print_report
from brim.errors import UnknownName

if TYPE_CHECKING:
    from rich.console import RenderableType

FILTER = typer.Argument(None, metavar="TEXT", show_default=False, help="Only rows that have this in a name.")


def print_listing(
    kind: str,
    rows: Sequence[Any],
    report: Callable[[Sequence[Any]], RenderableType],
    text: str | None,
    *,
    as_json: bool,
) -> None:
    """Print the rows whose name or alias has `text` in it, as a table or as JSON.

    Raises:
        UnknownName: no row has.
    """
    wanted = _fold(text or "")
    found = [row for row in rows if any(wanted in _fold(name) for name in _names(row))]
    if not found:
        raise UnknownName(kind=kind, name=str(text), known=[_names(row)[0] for row in rows])
    if as_json:
        print_json({f"{kind.lower()}s": [_describe(row) for row in found]})
    else:
        print_report(report(found))


def _names(row: Any) -> tuple[str, ...]:
    return (getattr(row, "name", None) or row.id, *getattr(row, "aliases", ()))


def _describe(row: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if key != "config"}


def _fold(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")

"""`brim optimizers`: optimizers and what each keeps in memory."""

from __future__ import annotations

from brim.cli.listing import FILTER, print_listing
from brim.cli.options import AS_JSON


def run_optimizers(text: str | None = FILTER, as_json: bool = AS_JSON) -> None:
    """List the optimizers and what each keeps in memory.

    \b
    Example:
      brim optimizers 8bit
    """
    from brim.report.listings import format_optimizers
    from brim.tables.read import list_optimizers

    print_listing("optimizer", list_optimizers(), format_optimizers, text, as_json=as_json)

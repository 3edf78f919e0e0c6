"""`brim tasks`: tasks and the effective batch each is best trained with."""

from __future__ import annotations

from brim.cli.listing import FILTER, print_listing
from brim.cli.options import AS_JSON


def run_tasks(text: str | None = FILTER, as_json: bool = AS_JSON) -> None:
    """List the tasks and their effective batches.

    \b
    Example:
      brim tasks --json
    """
    from brim.report.listings import format_tasks
    from brim.tables.read import list_tasks

    print_listing("task", list_tasks(), format_tasks, text, as_json=as_json)

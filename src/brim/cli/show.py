"""`brim show`: a saved plan, as it was printed."""

from __future__ import annotations

import typer

from brim.cli.options import AS_JSON
from brim.cli.results import print_plan, suggest_file

_PLAN = typer.Argument(..., metavar="PLAN", show_default=False, help="A file that `brim plan --out` wrote.")


def run_show(plan: str = _PLAN, as_json: bool = AS_JSON) -> None:
    """Show a saved plan.

    \b
    Example:
      brim show plan.json
    """
    from brim import api

    loaded = api.load_plan(plan)
    print_plan(loaded, suggest_file(loaded, plan), as_json=as_json)

"""`brim show`: a saved plan, as it was printed, or a watched run."""

from __future__ import annotations

import typer

from brim.cli.options import AS_JSON
from brim.cli.results import print_plan, suggest_file
from brim.cli.watched import find_run, print_run

_PLAN = typer.Argument(
    ..., metavar="PLAN", show_default=False, help="What `brim plan --out` wrote, or a run's brim-run.json."
)


def run_show(plan: str = _PLAN, as_json: bool = AS_JSON) -> None:
    """Show a saved plan, or a watched run beside its plan.

    \b
    Examples:
      brim show plan.json
      brim show out/brim-run.json
    """
    from brim import api

    run = find_run(plan)
    if run is not None:
        print_run(run, as_json=as_json)
        return
    loaded = api.load_plan(plan)
    print_plan(loaded, suggest_file(loaded, plan), as_json=as_json)

"""`brim history`: measured runs beside what was predicted; as a file, from a file, forgotten."""

from __future__ import annotations

import typer

from brim.cli.options import AS_JSON
from brim.cli.runs import ask_before_forgetting, print_runs, say
from brim.errors import InvalidInput, UnknownName

_ACTION = typer.Argument(None, metavar="ACTION", show_default=False, help="export, import or forget; none: list.")
_FILE = typer.Argument(None, metavar="FILE", show_default=False, help="A file of runs, one line of JSON each.")
_GPU = typer.Option(None, "--gpu", metavar="NAME", help="Only runs on this card.")
_MODEL = typer.Option(None, "--model", metavar="NAME", help="Only runs of this model.")
_BEFORE = typer.Option(None, "--before", metavar="DATE", help="Only runs that ended before this day (UTC).")
_ALL = typer.Option(False, "--all", help="Forget every run.")
_YES = typer.Option(False, "--yes", help="Forget without asking.")


def run_history(
    action: str | None = _ACTION,
    file: str | None = _FILE,
    gpu: str | None = _GPU,
    model: str | None = _MODEL,
    before: str | None = _BEFORE,
    everything: bool = _ALL,
    yes: bool = _YES,
    as_json: bool = AS_JSON,
) -> None:
    """Show measured runs beside what was predicted, and what they teach the formula.

    Kept on this machine alone, without names of people, paths, data or private models. BRIM_HISTORY names another file,
    or switches it off (BRIM_HISTORY=off).

    \b
    Examples:
      brim history --gpu rtx-4090
      brim history export runs.jsonl
      brim history forget --before 2026-01-01
    """
    from brim import api
    from brim.history.runs import require_store

    require_store()
    wanted = api.Wanted(gpu=gpu, model=model, before=before)
    if action in ("export", "import") and file is None:
        raise InvalidInput(f"name a file: `brim history {action} runs.jsonl`")
    if action is None:
        print_runs(api.list_observations(wanted), as_json=as_json)
    elif action == "export":
        say({"exported": api.export_history(str(file)), "file": file}, as_json=as_json)
    elif action == "import":
        new, known = api.import_history(str(file))
        say({"imported": new, "known": known, "file": file}, as_json=as_json)
    elif action == "forget":
        ask_before_forgetting(wanted, everything=everything, yes=yes)
        say({"forgotten": api.forget(wanted)}, as_json=as_json)
    else:
        raise UnknownName(kind="action", name=action, known=("export", "import", "forget"))

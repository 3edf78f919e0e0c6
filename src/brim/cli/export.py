"""`brim export`: a saved plan in the words of a framework."""

from __future__ import annotations

import typer

from brim.cli.options import AS_JSON
from brim.cli.output import print_json, print_report
from brim.cli.results import EXPORT_DIR, FOR_VERSION, write_export_files

_PLAN = typer.Argument(..., metavar="PLAN", show_default=False, help="A file that `brim plan --out` wrote.")
_TARGET = typer.Argument(
    ..., metavar="TARGET", show_default=False, help="trl, transformers, unsloth, accelerate or deepspeed."
)


def run_export(
    plan: str = _PLAN,
    target: str = _TARGET,
    export_dir: str = EXPORT_DIR,
    for_version: str | None = FOR_VERSION,
    as_json: bool = AS_JSON,
) -> None:
    """Write a saved plan's configuration for a framework.

    The script runs as it is; the line that starts it is printed last.

    \b
    Examples:
      brim export plan.json trl --export-dir run
      brim export plan.json trl --for-version 0.20
    """
    from brim import api

    exported = api.export(api.load_plan(plan), target, version=for_version)
    next_commands = write_export_files(exported, export_dir)
    if as_json:
        print_json({"target": exported.target, "settings": exported.settings, "launch": exported.launch})
        return
    from brim.report.exports import format_export

    print_report(format_export(exported, next_commands=next_commands))

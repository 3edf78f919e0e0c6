"""What the verbs that make or read a plan share: writing it down, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from brim.cli.output import print_json, print_remark, print_report

if TYPE_CHECKING:
    from brim.exporters.record import Export
    from brim.planner.record import Plan

EXPORT_DIR = typer.Option(".", "--export-dir", metavar="DIR", help="Folder for the exported files.")
FOR_VERSION = typer.Option(
    None, "--for-version", metavar="VERSION",
    help="Release of the target to write for, such as 0.20 of TRL; the newest if left out.",
)  # fmt: skip


def write_results(plan: Plan, *, out: str | None, exported: Export | None, folder: str) -> list[str]:
    """Write the plan and the export that were asked for, say so on stderr, and return what to type next."""
    from brim import api

    if out is not None:
        api.save_plan(plan, out)
        print_remark(f"wrote {out}: the plan")
    if exported is not None:
        return write_export_files(exported, folder)
    return suggest_file(plan, out) if out is not None else []


def suggest_file(plan: Plan, path: str) -> list[str]:
    """Return the command that exports a saved plan, if the plan's trainer is a target."""
    return [shlex.join(["brim", "export", path, target]) for target in _find_target(plan)]


def write_export_files(exported: Export, folder: str) -> list[str]:
    """Write the files of an export, say so on stderr, and return the line that starts the run."""
    from brim.exporters.render import write_export

    for path in write_export(exported, folder):
        print_remark(f"wrote {path}")
    for note in exported.notes:
        print_remark(f"note: {note}")
    move = f"cd {shlex.quote(folder)} && " if folder != "." else ""
    return [move + exported.launch]


def suggest_export(plan: Plan, model: str, job: Mapping[str, Any]) -> list[str]:
    """Return the same command with `--export`, if the plan's trainer is a target."""
    words = ["brim", "plan", model]
    for name, value in job.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", f"{value}"]
    return [shlex.join([*words, "--export", target]) for target in _find_target(plan)]


def print_plan(plan: Plan, next_commands: Sequence[str], *, as_json: bool) -> None:
    """Print a plan as text or JSON."""
    if as_json:
        from brim import api

        print_json(api.describe_plan(plan))
        return
    from brim.report.plan import format_plan

    print_report(format_plan(plan, next_commands=next_commands))


def _find_target(plan: Plan) -> list[str]:
    from brim.tables.dialects import list_dialects

    trainer = plan.workload.recipe.engine.name
    return [trainer] if any(row.target == trainer for row in list_dialects()) else []

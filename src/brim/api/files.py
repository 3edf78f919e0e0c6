"""Plans and watched runs as files: written, read back, and in the words of a framework."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from brim.errors import InvalidFile, UnknownName
from brim.files import write_text
from brim.planner.document import describe_plan, read_plan
from brim.planner.document import schema as schema_of_plans
from brim.planner.record import Plan
from brim.tables.read import find_link, find_optimizer, find_task, find_trainer

if TYPE_CHECKING:
    from brim.exporters.record import Export
    from brim.runtime.run_record import RunRecord

_LARGEST_BYTES = 50_000_000
_PLANNED = ("plan", "estimate")
"""Records whose schema the planner has."""


def export(plan: Plan, target: str, *, version: str | None = None) -> Export:
    """Return the plan in the words of a framework: keywords, files, launch line.

    Args:
        plan: what `plan` or `load_plan` returned.
        target: trl, transformers, unsloth, accelerate or deepspeed.
        version: release of the target to write for, for example `0.20`; the newest if None.

    Raises:
        UnknownName: no such target or release. Inexpressible: the target has no word for a setting of the plan.
    """
    from brim.exporters import export_plan

    return export_plan(plan, target, version=version)


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write the plan as JSON: whole or not at all.

    Raises:
        InvalidFile: the folder is missing or cannot be written to.
    """
    write_text(path, json.dumps(describe_plan(plan), indent=2) + "\n")


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Return the plan a file holds, checked.

    Raises:
        InvalidFile: the file is missing, no regular file, too large, broken, of a newer schema, or it names an
            optimizer, trainer or task that no table has.
    """
    name = os.fspath(path)
    loaded = read_plan(_read_text(name, "no plan is"), path=name)
    try:
        _check_names(loaded)
    except UnknownName as error:
        raise InvalidFile(path=name, problem=str(error)) from None
    return loaded


def load_run(path: str | os.PathLike[str]) -> RunRecord:
    """Return the watched run that a `brim-run.json` holds, checked: what was predicted, measured and seen.

    Args:
        path: the file, or the folder it is in, such as the output folder of a trainer.

    Raises:
        InvalidFile: the file is missing, no regular file, too large, broken, or of a newer schema.
    """
    from brim.runtime.run_record import RUN_FILE, read_run

    name = os.path.join(path, RUN_FILE) if os.path.isdir(path) else os.fspath(path)
    return read_run(_read_text(name, "no run is"), path=name)


def schema(what: str) -> dict[str, Any]:
    """Return the JSON schema of a record: a `plan`, what `brim estimate --json` prints (`estimate`), a watched `run`.

    Raises:
        UnknownName: none of these.
    """
    if what in _PLANNED:
        return schema_of_plans(what)
    if what != "run":
        raise UnknownName(kind="schema", name=what, known=(*_PLANNED, "run"))
    from brim.runtime.run_record import schema_run

    return schema_run()


def _read_text(name: str, too_large: str) -> str:
    from brim.readers.regular_file import read_whole

    raw = read_whole(name, _LARGEST_BYTES, too_large)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidFile(path=name, problem="cannot be read: not UTF-8 text") from None


def _check_names(plan: Plan) -> None:
    """Raise UnknownName if a plan names what no table has."""
    workload = plan.workload
    find_optimizer(workload.recipe.optimizer)
    find_trainer(workload.recipe.engine.name)
    find_task(workload.task)
    if workload.cluster.device.link is not None:
        find_link(workload.cluster.device.link)

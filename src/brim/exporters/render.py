"""From a plan to a framework's files: the one door of this room."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import mkstemp

from brim.errors import InvalidFile
from brim.exporters.accelerate import export_accelerate
from brim.exporters.deepspeed import export_deepspeed
from brim.exporters.record import Export, check_product
from brim.exporters.refusals import refuse_inexpressible
from brim.exporters.trainer import export_transformers
from brim.exporters.trl import export_trl
from brim.exporters.unsloth import export_unsloth
from brim.planner.record import Plan
from brim.planner.warnings import NOT_EXACT
from brim.tables.dialects import Dialect, find_dialect

EXPORTERS: Mapping[str, Callable[[Plan, Dialect], Export]] = {
    "trl": export_trl,
    "transformers": export_transformers,
    "unsloth": export_unsloth,
    "accelerate": export_accelerate,
    "deepspeed": export_deepspeed,
}


def list_targets() -> tuple[str, ...]:
    """Return the names of all export targets."""
    return tuple(EXPORTERS)


def export_plan(plan: Plan, target: str, *, version: str | None = None) -> Export:
    """Return the plan in the words of a framework.

    Args:
        plan: a plan whose batch multiplies to its effective batch.
        target: one of `list_targets()`, any case.
        version: of the package whose words are used (see targets.toml), for example `4.57.6` for transformers;
            the newest dialect if None.

    Raises:
        UnknownName: no such target, or no dialect for that version.
        Inexpressible: the target has no word for a setting of the plan.
        InvalidStrategy: the plan's batch does not multiply to its effective batch.
    """
    dialect = find_dialect(target, version)
    check_product(plan)
    refuse_inexpressible(plan, dialect)
    export = EXPORTERS[dialect.target](plan, dialect)
    return replace(export, notes=(*export.notes, *_warn_of_accumulation(plan, dialect)))


def _warn_of_accumulation(plan: Plan, dialect: Dialect) -> tuple[str, ...]:
    """Return what the table of exactness says of the plan's class; scripts for Accelerate count for themselves."""
    if dialect.target == "accelerate":
        return ()
    return tuple(warning.text for warning in plan.warnings if warning.code == NOT_EXACT)


def write_export(export: Export, folder: str | Path) -> list[Path]:
    """Write every file of an export and return the paths, the script first.

    All texts are on the disk under temporary names before the first one gets its own: a full disk or a folder that
    cannot be written leaves nothing behind.

    Raises:
        InvalidFile: the folder cannot be made or written.
    """
    place = Path(folder)
    waiting: list[tuple[Path, Path]] = []
    try:
        place.mkdir(parents=True, exist_ok=True)
        for file in export.files:
            waiting.append((_write_aside(place, file.text), place / file.name))
        for aside, path in waiting:
            os.replace(aside, path)
    except (OSError, ValueError) as error:
        for aside, _ in waiting:
            aside.unlink(missing_ok=True)
        raise InvalidFile(path=str(folder), problem=f"cannot write the export: {error}") from error
    return [path for _, path in waiting]


def _write_aside(place: Path, text: str) -> Path:
    handle, name = mkstemp(prefix=".brim-", dir=place)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        os.chmod(name, 0o644)
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)

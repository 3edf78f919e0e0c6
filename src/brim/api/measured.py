"""What was measured before: the history as files, and what it says of the formula."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brim.errors import InvalidFile
from brim.files import write_text
from brim.history.place import find_existing
from brim.history.runs import (
    Wanted,
    add_observation,
    count_observations,
    forget,
    import_observations,
    list_observations,
)
from brim.planner.answerer import Answerer
from brim.spec.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Iterable

    from brim.cost.correction import Calibration
    from brim.spec.observation import Observation

__all__ = [
    "Wanted", "add_observation", "calibrate", "count_observations", "describe_observations", "export_history",
    "find_calibration", "forget", "import_history", "list_calibrations", "list_observations",
]  # fmt: skip

_LARGEST_FILE_BYTES = 200_000_000
_MOST_RUNS = 50
"""Newest runs of a card, trainer and family that a calibration is fitted on."""


def export_history(path: str | os.PathLike[str]) -> int:
    """Write every measured run as a line of JSON, whole or not at all, and return how many they are.

    Raises:
        InvalidFile: the history cannot be read, or the file not written.
    """
    from brim.history.document import write_line

    runs = list_observations()
    write_text(path, "".join(f"{write_line(run)}\n" for run in reversed(runs)))
    return len(runs)


def import_history(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Take in the runs of a file that `export_history` wrote, all or none; one that is known is not doubled.

    Returns:
        How many were new, and how many were known.

    Raises:
        InvalidFile: the file or a line of it is broken, or the history cannot be written.
    """
    from brim.history.document import read_lines
    from brim.readers.regular_file import read_whole

    name = os.fspath(path)
    return import_observations(read_lines(read_whole(name, _LARGEST_FILE_BYTES, "import it in parts"), path=name))


def describe_observations(observations: Iterable[Observation]) -> list[dict[str, Any]]:
    """Return runs as JSON objects, each with its key."""
    from brim.history.document import describe_observation, identify

    return [{"id": identify(run), **describe_observation(run)} for run in observations]


def find_calibration(workload: Workload) -> Calibration | None:
    """Return what measured runs of a workload's card, trainer and family say of the formula; None if too few do.

    Runs of the installed torch decide; where they are too few and the card is in another machine, those of the newest
    torch that has enough.

    Raises:
        InvalidFile: the history cannot be read.
    """
    if find_existing() is None:
        return None
    from brim.history.privacy import name_card, name_family

    device, trainer, family = workload.cluster.device, workload.recipe.engine.name, workload.model.model_type
    wanted = Wanted(gpu=name_card(device.name), family=name_family(family), trainer=trainer)
    runs = list_observations(wanted, limit=_MOST_RUNS)
    here = _read_installed_torch() if runs else ""
    for torch in _list_releases(runs, here, here_only=device.free_bytes is not None and bool(here)):
        found = _fit(runs, torch, device=device.name, trainer=trainer, model_type=family)
        if found is not None:
            return found
    return None


def list_calibrations(observations: Iterable[Observation]) -> tuple[Calibration, ...]:
    """Return every calibration that runs give, one for each card, torch, trainer and family with enough of them."""
    from brim.cost.calibration import read_torch
    from brim.history.privacy import find_card_name

    groups: dict[tuple[str, str, str, str], list[Observation]] = {}
    for run in observations:
        shape, trainer = run.workload.model, run.workload.recipe.engine.name
        key = find_card_name(run), read_torch(run.versions), trainer, shape.model_type
        groups.setdefault(key, []).append(run)
    fits = (
        _fit(runs[:_MOST_RUNS], torch, device=card, trainer=trainer, model_type=family)
        for (card, torch, trainer, family), runs in sorted(groups.items(), key=lambda pair: pair[0])
        if torch
    )
    return tuple(found for found in fits if found is not None)


def read_calibration(workload: Workload) -> tuple[Calibration | None, tuple[str, ...]]:
    """Return what measured runs say of the formula, and what to say where they cannot be read."""
    try:
        return find_calibration(workload), ()
    except (InvalidFile, RuntimeError, ImportError) as error:  # a broken history must not stop a plan
        return None, (f"measured runs were not used: {error}",)


def correct_formula(formula: Answerer, calibration: Calibration | None) -> Answerer:
    """Return the formula as measured runs correct it; itself where there are too few."""
    if calibration is None:
        return formula
    from brim.cost.estimate import certain_bytes
    from brim.planner.calibrated import calibrated

    return calibrated(formula, calibration, certain_bytes)


def calibrate(formula: Answerer, workload: Workload) -> tuple[Answerer, tuple[str, ...]]:
    """Return the formula as measured runs correct it, and what to say where they could not be read."""
    calibration, remarks = read_calibration(workload)
    return correct_formula(formula, calibration), remarks


def _fit(
    runs: Iterable[Observation], torch: str, *, device: str, trainer: str, model_type: str
) -> Calibration | None:  # fmt: skip
    from brim.cost.calibration import Formula, fit_calibration, read_torch
    from brim.cost.estimate import certain_bytes, estimate, peak_bytes
    from brim.cost.steptime import seconds

    alike = [run for run in runs if read_torch(run.versions) == torch]
    formula = Formula(peak=peak_bytes, seconds=seconds, estimate=estimate, certain=certain_bytes)
    return fit_calibration(alike, formula, device=device, torch=torch, trainer=trainer, model_type=model_type)


def _list_releases(runs: Iterable[Observation], here: str, *, here_only: bool) -> list[str]:
    """Return the releases of torch among runs: the installed one, then, unless it alone counts, the newest first."""
    from brim.cost.calibration import read_torch

    def order(release: str) -> tuple[bool, list[int]]:
        return release == here, [int(part) for part in release.split(".") if part.isdecimal()]

    found = {read_torch(run.versions) for run in runs} - {""}
    return sorted((one for one in found if one == here or not here_only), key=order, reverse=True)


def _read_installed_torch() -> str:
    """Return major and minor of the torch that is installed, without importing it; empty if there is none.

    Its version.py is read: importing `importlib.metadata` would take half as long as all the rest of history.
    """
    from importlib.util import find_spec

    found = find_spec("torch")
    if found is None or not found.origin:
        return ""
    try:
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    release = re.search(r"^__version__ = '(\d+\.\d+)", text, re.MULTILINE)
    return release[1] if release else ""

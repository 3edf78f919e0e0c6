"""Measured runs as a table: what was predicted, what was measured, and what they teach the formula."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from brim.cost.correction import Calibration
from brim.history.privacy import find_card_name
from brim.planner.calibrated import describe_calibrated_speed, describe_calibration
from brim.report.memory import make_table
from brim.report.numbers import format_count, format_difference, format_gib, format_seconds
from brim.report.plan import format_list, format_section
from brim.report.words import describe_strategy, list_varied
from brim.spec.observation import Observation

_MOST_ROWS = 40
_NUMBERS = ("peak GiB", "predicted", "step", "said")


def format_history(runs: Sequence[Observation], calibrations: Sequence[Calibration]) -> Group:
    """Return the runs, newest first, and the corrections that follow from them."""
    if not runs:
        return Group(Text("No measured runs yet: `brim trial` and watched runs land here."))
    table = make_table("run", "card and model", "strategy", *_NUMBERS, "verdict", right=_NUMBERS, whole=("run",))
    shown = runs[:_MOST_ROWS]
    knobs = list_varied([run.strategy for run in shown])
    for run in shown:
        strategy = describe_strategy(run.strategy, knobs)
        model = run.workload.model.name.rpartition("/")[2]
        what = f"{find_card_name(run)}\n{model}, {run.workload.recipe.method}"
        table.add_row(f"{run.finished[:10]}\n{run.kind}", what, strategy, *_list_figures(run))
    taught = [line for calibration in calibrations for line in _list_lessons(calibration)]
    none = "nothing yet: three different runs of one card, torch, trainer and family of models are needed"
    listed = (
        f"the newest {len(shown)} of {_count(len(runs))} (--json has all)"
        if len(runs) > len(shown)
        else _count(len(runs))
    )
    note = f"\n{listed}; predicted: as it was said at the time, with its error against what was measured"
    return Group(table, Text(note, style="dim"), *format_section("What they teach", format_list(taught or [none])))


def _list_figures(run: Observation) -> Iterator[str]:
    said, peak, seconds = run.predicted, run.peak_allocated_bytes, run.step_seconds
    yield format_gib(peak) if peak is not None else "-"
    yield _compare(format_gib, said.peak_allocated_bytes if said else None, peak)
    yield format_seconds(seconds) if seconds is not None else "-"
    yield _compare(format_seconds, said.step_seconds if said else None, seconds)
    yield "fits" if run.fits else run.problem or "does not fit"


def _compare(write: Any, said: float | None, measured: float | None) -> str:
    if said is None:
        return "-"
    return f"{write(said)} ({format_difference(said, measured)})" if measured else write(said)


def _list_lessons(calibration: Calibration) -> Iterator[str]:
    yield describe_calibration(calibration)
    if calibration.seconds is not None:
        name = f"{calibration.model_type} models on {calibration.device}"
        factor = f"measured was {calibration.seconds.factor:.3f} x the formula's"
        yield f"step time of {name}: {describe_calibrated_speed(calibration.seconds)}; {factor}"


def _count(number: int) -> str:
    return f"{format_count(number)} run{'s' if number != 1 else ''}"


def format_done(done: Mapping[str, Any]) -> Text:
    """Return what an action on the history did, in one line."""
    if "exported" in done:
        return Text(f"wrote {done['file']}: {_count(done['exported'])}")
    if "imported" in done:
        return Text(f"{_count(done['imported'])} imported, {format_count(done['known'])} known already")
    return Text(f"{_count(done['forgotten'])} forgotten")

"""What `brim history` prints, and what it asks before it deletes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from brim.cli.output import print_json, print_report
from brim.errors import InvalidInput

if TYPE_CHECKING:
    from brim.history.runs import Wanted
    from brim.spec.observation import Observation


def print_runs(runs: Sequence[Observation], *, as_json: bool) -> None:
    """Print measured runs and what they teach the formula, as text or JSON."""
    from dataclasses import asdict

    from brim import api

    calibrations = api.list_calibrations(runs)
    if as_json:
        rows = [asdict(calibration) for calibration in calibrations]
        print_json({"runs": api.describe_observations(runs), "calibrations": rows})
        return
    from brim.report.history import format_history

    print_report(format_history(runs, calibrations))


def say(done: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what was done, as text or JSON."""
    if as_json:
        print_json(done)
        return
    from brim.report.history import format_done

    print_report(format_done(done))


def ask_before_forgetting(wanted: Wanted, *, everything: bool, yes: bool) -> None:
    """Ask whether runs shall be deleted.

    Raises:
        InvalidInput: it was not said which, or nobody is there to ask. typer.Abort: no.
    """
    import typer

    from brim import api

    named = any((wanted.gpu, wanted.model, wanted.before))
    if named == everything:
        raise InvalidInput("say which runs: --all, or any of --gpu, --model and --before")
    if yes:
        return
    number = api.count_observations(wanted)
    if not sys.stdin.isatty():
        raise InvalidInput(f"{number} runs would be forgotten for good; add --yes")
    typer.confirm(f"Forget {number} runs for good?", abort=True)

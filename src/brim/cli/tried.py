"""What `brim trial` says, prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from brim.cli.output import print_json, print_remark, print_report
from brim.cli.results import suggest_file

if TYPE_CHECKING:
    from brim.spec.observation import Observation
    from brim.trials.record import Trial


def say_run(run: Observation) -> None:
    """Say on stderr what one run showed, as it ends."""
    from brim.report.trial import describe_run

    print_remark(describe_run(run))


def write_trial(trial: Trial, *, out: str | None, html: str | None) -> list[str]:
    """Write the plan and the page that were asked for, say so on stderr, and return what to type next."""
    from brim import api

    next_commands: list[str] = []
    if out is not None and trial.plan is not None:
        api.save_plan(trial.plan, out)
        print_remark(f"wrote {out}: the plan")
        next_commands = suggest_file(trial.plan, out)
    if html is not None:
        from brim.files import write_text
        from brim.report.trial import trial_page

        write_text(html, trial_page(trial))
        print_remark(f"wrote {html}")
    return next_commands


def print_trial(trial: Trial, next_commands: Sequence[str], *, as_json: bool) -> None:
    """Print a trial as text or JSON."""
    from brim import api

    if as_json:
        print_json(api.describe_trial(trial))
        return
    from brim.report.trial import format_trial

    print_report(format_trial(trial, next_commands=next_commands))

"""Reading and showing `brim-run.json`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from brim.cli.output import print_json, print_report

if TYPE_CHECKING:
    from brim.runtime.run_record import RunRecord

_MOST_BYTES = 50_000_000


def find_run(path: str) -> RunRecord | None:
    """Return the watched run that a file holds; None if it holds something else, such as a plan.

    Raises:
        InvalidFile: the file cannot be read, or it is a run and broken.
    """
    from brim.readers.regular_file import open_regular
    from brim.runtime.run_record import read_run

    with open_regular(path) as (file, _):
        raw = file.read(_MOST_BYTES + 1)
    return read_run(raw, path=path) if b'"measured"' in raw and b'"verdicts"' in raw else None


def print_run(record: RunRecord, *, as_json: bool) -> None:
    """Print a watched run as text or JSON."""
    if as_json:
        from brim.runtime.run_record import describe_run

        print_json(json.loads(describe_run(record)))
        return
    from brim.report.run import format_run

    print_report(format_run(record))

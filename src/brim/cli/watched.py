"""Reading and showing `brim-run.json`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from brim.cli.output import print_json, print_report

if TYPE_CHECKING:
    from brim.runtime.run_record import RunRecord

_HEAD_BYTES = 2_000_000
"""Read to tell a run from a plan: a run's keys stand before its observation, which is the longest part."""


def find_run(path: str) -> RunRecord | None:
    """Return the watched run that a file or folder holds; None if it holds something else, such as a plan.

    Raises:
        InvalidFile: the file cannot be read, or it is a run and broken.
    """
    from brim import api
    from brim.readers.regular_file import open_regular
    from brim.runtime.run_record import RUN_FILE

    if os.path.basename(path) == RUN_FILE or os.path.isfile(os.path.join(path, RUN_FILE)):
        return api.load_run(path)
    with open_regular(path) as (file, _):
        raw = file.read(_HEAD_BYTES)
    return api.load_run(path) if b'"measured"' in raw and b'"state"' in raw else None


def print_run(record: RunRecord, *, as_json: bool) -> None:
    """Print a watched run as text or JSON."""
    if as_json:
        from brim.runtime.run_record import describe_run

        print_json(json.loads(describe_run(record)))
        return
    from brim.report.run import format_run

    print_report(format_run(record))

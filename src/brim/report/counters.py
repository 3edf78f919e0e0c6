"""A timeline as Chrome's trace format, which Perfetto, chrome://tracing and Kineto's viewers open.

Source: "Trace Event Format" (Google), sections Counter Events (`C`), Complete Events (`X`), Metadata Events (`M`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from brim.cost.timeline import Timeline, list_spans

_PROCESS, _THREAD = 1, 1
_CLOCK = "no clock ran: 1 microsecond is one allocation or free, in order of the step"

Record = dict[str, Any]


def counters_json(timeline: Timeline) -> str:
    """Return the timeline as JSON: a counter in bytes per ledger row, their sum, what is reserved, and the phases.

    A counter holds from its record to the next one of its name; records are written where a value changes.
    """
    records = [*_name_tracks(), *_list_phases(timeline), *_list_counters(timeline)]
    notes = {"clock": _CLOCK, "unit": "bytes", "rows": list(timeline.rows), "num_points": len(timeline.points)}
    limits = {"capacity_bytes": timeline.capacity_bytes, "budget_bytes": timeline.budget_bytes}
    whole = {"traceEvents": records, "displayTimeUnit": "ms", "metadata": notes | limits}
    return json.dumps(whole, separators=(",", ":"))


def _name_tracks() -> Iterator[Record]:
    for kind, name in (("process_name", "one device of the step"), ("thread_name", "phases")):
        yield {"ph": "M", "name": kind, "pid": _PROCESS, "tid": _THREAD, "ts": 0, "args": {"name": name}}


def _list_phases(timeline: Timeline) -> Iterator[Record]:
    points = timeline.points
    for span in list_spans(timeline):
        start = points[span.first].ordinal
        highest = max(point.allocated_bytes for point in points[span.first : span.last + 1])
        yield {
            "ph": "X", "name": span.phase, "cat": "phase", "pid": _PROCESS, "tid": _THREAD, "ts": start,
            "dur": points[span.last].ordinal - start + 1, "args": {"peak_allocated_bytes": highest},
        }  # fmt: skip


def _list_counters(timeline: Timeline) -> Iterator[Record]:
    written: dict[str, int] = {}
    for point in timeline.points:
        values = dict(zip(timeline.rows, point.row_bytes, strict=True))
        values |= {"allocated": point.allocated_bytes, "reserved": point.reserved_bytes}
        for name, value in values.items():
            if written.get(name) != value:
                written[name] = value
                yield {"ph": "C", "name": name, "pid": _PROCESS, "ts": point.ordinal, "args": {"bytes": value}}

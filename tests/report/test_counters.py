"""The trace file: JSON that viewers take, counters that sum up, phases end to end."""

from __future__ import annotations

import json
from typing import Any

from brim.cost.timeline import Point, Timeline
from brim.report.counters import counters_json

ROWS = ("parameters", "gradients", "activations")


def make_timeline() -> Timeline:
    levels = [
        ("model", (4096, 0, 0)), ("forward of layers", (4096, 0, 512)), ("forward of layers", (4096, 0, 1536)),
        ("loss", (4096, 0, 2560)), ("backward", (4096, 512, 2560)), ("backward", (4096, 512, 0)),
    ]  # fmt: skip
    points = [
        Point(ordinal=index, phase=phase, row_bytes=held, reserved_bytes=2**21)
        for index, (phase, held) in enumerate(levels)
    ]
    return Timeline(rows=ROWS, points=tuple(points), capacity_bytes=2**30)


def read(timeline: Timeline) -> dict[str, Any]:
    return json.loads(counters_json(timeline))


def test_every_record_has_what_its_kind_needs() -> None:
    records = read(make_timeline())["traceEvents"]
    assert {record["ph"] for record in records} == {"M", "C", "X"}
    for record in records:
        assert {"ph", "name", "pid", "ts"} <= record.keys()
        assert isinstance(record["ts"], int) and record["ts"] >= 0
        if record["ph"] == "X":
            assert record["dur"] > 0 and "tid" in record
        if record["ph"] == "C":
            assert list(record["args"]) == ["bytes"] and isinstance(record["args"]["bytes"], int)


def test_counters_sum_up_to_what_is_allocated_at_every_point() -> None:
    timeline = make_timeline()
    counters = [record for record in read(timeline)["traceEvents"] if record["ph"] == "C"]
    assert {record["name"] for record in counters} == {*ROWS, "allocated", "reserved"}
    assert [record["ts"] for record in counters] == sorted(record["ts"] for record in counters)
    values: dict[str, int] = {}
    for point in timeline.points:
        values |= {one["name"]: one["args"]["bytes"] for one in counters if one["ts"] == point.ordinal}
        assert tuple(values[row] for row in ROWS) == point.row_bytes
        assert values["allocated"] == sum(values[row] for row in ROWS)
        assert values["reserved"] == point.reserved_bytes


def test_phases_follow_one_another_without_gap() -> None:
    timeline = make_timeline()
    slices = [record for record in read(timeline)["traceEvents"] if record["ph"] == "X"]
    assert [one["name"] for one in slices] == ["model", "forward of layers", "loss", "backward"]
    for one, following in zip(slices, [*slices[1:], {"ts": len(timeline.points)}], strict=True):
        assert one["ts"] + one["dur"] == following["ts"]
    assert slices[2]["args"] == {"peak_allocated_bytes": 6656}


def test_the_file_says_that_no_clock_ran() -> None:
    whole = read(make_timeline())
    assert "1 microsecond is one allocation or free" in whole["metadata"]["clock"]
    assert whole["metadata"]["unit"] == "bytes" and whole["metadata"]["capacity_bytes"] == 2**30


def test_nothing_recorded_is_a_file_too() -> None:
    assert {record["ph"] for record in read(Timeline(rows=(), points=()))["traceEvents"]} == {"M"}

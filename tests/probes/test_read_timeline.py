"""The timeline of a real trace: its peaks are the estimate's, its rows sum up to what is live."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from brim.cost.ledger import Ledger
from brim.cost.timeline import find_peak, list_spans
from brim.probes.follow import follow_step
from brim.probes.pieces import Event
from brim.probes.timeline import STACKED_ROWS, read_timeline
from brim.probes.trace import trace
from brim.probes.tracker import Storage
from real_steps import Case


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


@pytest.mark.parametrize("allocator", ["native", "expandable_segments"])
def test_peaks_are_those_of_the_estimate(allocator: str) -> None:
    case = Case("llama", dtype="bf16", attention="sdpa", allocator=allocator)
    tracker, _ = follow_step(case.workload, case.strategy, case.build)
    found = trace(case.workload, case.strategy, case.build, fold=False)
    timeline = read_timeline(
        tracker.events, tracker.storages, expandable=allocator == "expandable_segments", capacity_bytes=2**34
    )
    peak = find_peak(timeline)
    assert peak is not None
    assert (peak.allocated_bytes, peak.phase) == (found.peak_allocated_bytes, found.peak_moment)
    assert max(point.reserved_bytes for point in timeline.points) == found.peak_reserved_bytes
    assert timeline.capacity_bytes == 2**34
    highest = {span.phase: 0 for span in list_spans(timeline)}
    for point in timeline.points:
        highest[point.phase] = max(highest[point.phase], point.allocated_bytes)
    del highest["model"]
    assert highest == {moment.name: moment.total_bytes for moment in found.moments}


def test_every_row_of_a_moment_is_a_row_of_the_timeline() -> None:
    assert set(STACKED_ROWS.values()) <= set(Ledger.__slots__)


def test_points_are_changes_and_the_end_is_the_last_allocation() -> None:
    storages = {key: Storage(key, 512, "", "", "x", "byte", (512,), category="activation") for key in (0, 1)}
    storages[0].category = "parameter"
    events = [
        Event(-1, 0, "model"), Event(0, 512, "model"), Event(-1, 0, "loss"), Event(1, 1024, "loss"),
        Event(1, -1024, "loss"), Event(0, -512, "loss"),
    ]  # fmt: skip
    timeline = read_timeline(events, storages)
    assert timeline.rows == ("parameters", "activations")
    assert [(point.ordinal, point.phase, point.row_bytes) for point in timeline.points] == [
        (0, "model", (512, 0)), (1, "loss", (512, 1024)),
    ]  # fmt: skip
    assert timeline.points[-1].reserved_bytes == 2 * 2**20

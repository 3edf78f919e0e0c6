"""The stream of a trace as a timeline: what each row of the ledger holds after every allocation, and what is reserved.

Source: cost/allocator.py replays the caching allocator beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from brim.cost.allocator import CachingAllocator
from brim.cost.timeline import Point, Timeline
from brim.probes.phases import END_OF_STEP

if TYPE_CHECKING:
    from brim.probes.pieces import Event
    from brim.probes.tracker import Storage

# What lives longest lies lowest, so that the drawing's steps are those of what comes and goes.
STACKED_ROWS = {
    "parameter": "parameters", "buffer": "buffers", "optimizer_state": "optimizer_states", "workspace": "overhead",
    "gradient": "gradients", "input": "inputs", "activation": "activations", "temporary": "temporaries",
}  # fmt: skip
"""Ledger row of each category of storage, in stacking order."""


def read_timeline(
    events: Iterable[Event], storages: Mapping[int, Storage], *, expandable: bool = False,
    capacity_bytes: int | None = None, budget_bytes: int | None = None,
) -> Timeline:  # fmt: skip
    """Return memory after every event of a stream, row by row, with the bytes reserved.

    It ends with the last allocation: what follows is the model being dropped when the trace is over.

    Args:
        events: allocations and frees in order; those of 0 bytes only begin a phase and make no point.
        storages: what the events' keys stand for; rows are those of the categories they end up in.
        expandable: whether segments grow (`expandable_segments:True`).
        capacity_bytes: what the process can get on the card; only carried along.
        budget_bytes: what the plan may use; only carried along.
    """
    held = {storages[key].category for key in storages}
    categories = [category for category in STACKED_ROWS if category in held]
    place = {category: index for index, category in enumerate(categories)}
    live, points, allocator = [0] * len(categories), [], CachingAllocator(expandable=expandable)
    for event in _end_with_allocation(events):
        if event.num_bytes > 0:
            allocator.allocate(event.key, event.num_bytes)
        else:
            allocator.free(event.key)
        live[place[storages[event.key].category]] += event.num_bytes
        points.append(
            Point(
                ordinal=len(points), phase=event.phase, row_bytes=tuple(live), reserved_bytes=allocator.reserved_bytes
            )
        )
    rows = tuple(STACKED_ROWS[category] for category in categories)
    return Timeline(rows=rows, points=tuple(points), capacity_bytes=capacity_bytes, budget_bytes=budget_bytes)


def _end_with_allocation(events: Iterable[Event]) -> list[Event]:
    changes, phase = [], ""
    for event in events:
        phase = phase if event.phase == END_OF_STEP else event.phase  # drawn as part of the step it ends
        if event.num_bytes:
            changes.append(event._replace(phase=phase))
    while changes and changes[-1].num_bytes < 0:
        changes.pop()
    return changes

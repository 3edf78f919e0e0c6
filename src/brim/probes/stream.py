"""A stream of allocations, read: moments, the largest tensors at the peak, what the allocator would reserve."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from brim.cost.allocator import CachingAllocator
from brim.cost.calibration import margin_bytes
from brim.cost.ledger import Estimate, HeldTensor, Ledger, Moment
from brim.cost.overhead import context_bytes
from brim.probes.phases import END_OF_STEP, MODEL_PHASE, UNCOUNTED
from brim.probes.timeline import STACKED_ROWS
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

if TYPE_CHECKING:
    from brim.probes.tracker import Event, Storage

_MOST_TENSORS = 10
_MOST_REPEATS = 8
_LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Traced:
    """Two optimizer steps as a stream of allocations."""

    events: Sequence[Event]
    """Every allocation, free and begin of a phase, in order."""
    storages: Mapping[int, Storage]
    """What each number in the stream stands for."""
    notes: tuple[str, ...] = ()
    """What was assumed, one sentence each."""
    outside_bytes: int = 0
    """What the step holds on the device outside the allocator (paged optimizer states), bytes."""


def read_estimate(workload: Workload, strategy: Strategy, traced: Traced) -> Estimate:
    """Return the estimate that a stream of allocations means on the workload's device."""
    moments = list_moments(traced.events, traced.storages)
    peak = max(moments, key=lambda moment: moment.total_bytes)
    context = context_bytes(workload.cluster.device)
    capacity = workload.cluster.device.capacity_bytes - context
    fits = peak.total_bytes <= capacity  # what does not, dies in its first steps: no pool settles
    reserved = replay(
        traced.events, expandable=strategy.allocator == "expandable_segments",
        capacity_bytes=capacity if fits else None, most_repeats=_MOST_REPEATS if fits else 0,
    )  # fmt: skip
    return Estimate(
        source="trace", moments=moments, peak_allocated_bytes=peak.total_bytes, peak_reserved_bytes=reserved,
        device_bytes=reserved + context + traced.outside_bytes, peak_moment=peak.name,
        margin_bytes=margin_bytes("trace", peak.total_bytes),
        notes=(*_list_assumptions(workload, strategy), *traced.notes),
        tensors=list_tensors(traced.events, traced.storages),
    )  # fmt: skip


def _list_assumptions(workload: Workload, strategy: Strategy) -> Iterator[str]:
    """Yield what every trace of this workload takes as given, one sentence each."""
    yield f"sized for micro-batches whose every sequence has {workload.data.seq_len:,} tokens"
    yield "two matrix library workspaces and the process's context come from tables, not from the trace"
    if strategy.gradient_accumulation_steps > 2:
        yield f"micro-batches 3 to {strategy.gradient_accumulation_steps} repeat the second"
    if strategy.attention_kernel == "flash":
        yield "flash attention is PyTorch's own kernel, which keeps what the flash-attn package keeps"
    if workload.recipe.engine.evaluates:
        yield "evaluation runs with the training micro-batch"


def replay(
    events: Sequence[Event], *, expandable: bool = False, capacity_bytes: int | None = None,
    most_repeats: int = _MOST_REPEATS,
) -> int:  # fmt: skip
    """Return the most bytes the caching allocator reserves over a run whose second step is repeated.

    A pool is cut up differently each time until it has a block for everything: the second step is played again until
    it needs no further segment.

    Args:
        events: two optimizer steps.
        expandable: whether segments grow (`expandable_segments:True`).
        capacity_bytes: what the process may reserve; free segments are given back when it is reached.
        most_repeats: how often the second step is played again at most.
    """
    allocator = CachingAllocator(expandable=expandable, capacity_bytes=capacity_bytes)
    first, second = _find_steps(events)
    _play(allocator, events[:second])
    step = events[first:second]
    passes = _pair_lasting(step) if second > first else None
    for _ in range(most_repeats if passes is not None else 0):
        reserved = allocator.peak_reserved_bytes
        for older, newer in passes or ():
            allocator.rename(newer, older)
        _play(allocator, step)
        if allocator.peak_reserved_bytes == reserved:
            break
    _play(allocator, events[second:])
    return allocator.peak_reserved_bytes


def _play(allocator: CachingAllocator, events: Iterable[Event]) -> None:
    allocate, free = allocator.allocate, allocator.free
    for key, num_bytes, _, _ in events:
        if num_bytes > 0:
            allocate(key, num_bytes)
        elif num_bytes < 0:
            free(key)


def _find_steps(events: Sequence[Event]) -> tuple[int, int]:
    """Return where the second of two optimizer steps begins and ends; of more or fewer, twice the end of the stream."""
    ends = [index for index, event in enumerate(events) if not event.num_bytes and event.phase == END_OF_STEP]
    return (ends[0], ends[1]) if len(ends) == 2 else (len(events), len(events))


def _pair_lasting(step: Sequence[Event]) -> list[tuple[int, int]] | None:
    """Return storages from before the step with those that stand for them after it; None if they do not match."""
    made = {event.key: event.num_bytes for event in step if event.num_bytes > 0}
    freed = {event.key: -event.num_bytes for event in step if event.num_bytes < 0}
    older = [(key, size) for key, size in freed.items() if key not in made]
    newer = [(key, size) for key, size in made.items() if key not in freed]
    if [size for _, size in older] != [size for _, size in newer]:
        return None
    return [(one, other) for (one, _), (other, _) in zip(older, newer, strict=True)]


def list_moments(events: Iterable[Event], storages: Mapping[int, Storage]) -> tuple[Moment, ...]:
    """Return the highest point of each phase, in order of the step, with its ledger."""
    live = dict.fromkeys(STACKED_ROWS, 0)
    total, now, highest = 0, MODEL_PHASE, 0
    best: dict[str, tuple[int, dict[str, int]]] = {}
    for key, num_bytes, phase, _ in events:
        if phase != now:
            now, highest = phase, best[phase][0] if phase in best else 0
        if num_bytes:
            live[storages[key].category] += num_bytes
            total += num_bytes
        if total > highest and now not in UNCOUNTED:
            highest = total
            best[now] = total, live.copy()
    return tuple(Moment(name=name, ledger=_ledger(rows)) for name, (_, rows) in best.items())


def _ledger(live: Mapping[str, int]) -> Ledger:
    return Ledger(**{row: live.get(category, 0) for category, row in STACKED_ROWS.items()})


def list_tensors(events: Sequence[Event], storages: Mapping[int, Storage]) -> tuple[HeldTensor, ...]:
    """Return what is in memory at the peak, alike tensors together, the ten largest first."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for key in _live_at_peak(events):
        storage = storages[key]
        place = _LAYER_NUMBER.sub(".*", storage.name or storage.module)
        kind = (STACKED_ROWS[storage.category], place, storage.dtype, storage.op, storage.line, repr(storage.shape))
        alike.setdefault(kind, []).append(key)
    found = [_held(kind, keys, storages) for kind, keys in alike.items()]
    return tuple(sorted(found, key=lambda one: -one.bytes)[:_MOST_TENSORS])


def _live_at_peak(events: Sequence[Event]) -> list[int]:
    total = highest = peak = 0
    for index, (_, num_bytes, phase, _) in enumerate(events):
        total += num_bytes
        if total > highest and phase not in UNCOUNTED:
            highest, peak = total, index
    live: dict[int, None] = {}
    for key, num_bytes, _, _ in events[: peak + 1]:
        if num_bytes > 0:
            live[key] = None
        elif num_bytes < 0:
            del live[key]
    return list(live)


def _held(kind: tuple[str, ...], keys: Sequence[int], storages: Mapping[int, Storage]) -> HeldTensor:
    row, place, dtype, op, line, _ = kind
    return HeldTensor(
        bytes=sum(storages[key].num_bytes for key in keys), count=len(keys), row=row, module=place,
        shape=storages[keys[0]].shape, dtype=dtype, op=op, line=line,
    )  # fmt: skip

"""A stream of allocations, read: moments, the largest tensors at the peak, what the allocator would reserve."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from brim.cost.allocator import CachingAllocator
from brim.cost.calibration import margin_bytes
from brim.cost.ledger import Estimate, HeldTensor, Ledger, Moment
from brim.cost.overhead import context_bytes
from brim.probes.phases import MODEL_PHASE, UNCOUNTED
from brim.probes.pieces import STRIDE, Event, Piece, split_steps, write_out
from brim.probes.timeline import STACKED_ROWS
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

if TYPE_CHECKING:
    from brim.probes.tracker import Storage

_MOST_TENSORS = 10
_MOST_REPEATS = 8
_LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Traced:
    """Two optimizer steps as a stream of allocations."""

    pieces: Sequence[Piece]
    """Every allocation, free and begin of a phase, in order."""
    storages: Mapping[int, Storage]
    """What each number in the stream stands for."""
    notes: tuple[str, ...] = ()
    """What was assumed, one sentence each."""
    outside_bytes: int = 0
    """What the step holds on the device outside the allocator (paged optimizer states), bytes."""

    @property
    def events(self) -> list[Event]:
        """The stream written out."""
        return list(write_out(self.pieces))


def read_estimate(workload: Workload, strategy: Strategy, traced: Traced) -> Estimate:
    """Return the estimate that a stream of allocations means on the workload's device."""
    moments = list_moments(traced.pieces, traced.storages)
    peak = max(moments, key=lambda moment: moment.total_bytes)
    context = context_bytes(workload.cluster.device)
    capacity = workload.cluster.device.capacity_bytes - context
    fits = peak.total_bytes <= capacity  # what does not, dies in its first steps: no pool settles
    reserved = replay(
        traced.pieces, expandable=strategy.allocator == "expandable_segments",
        capacity_bytes=capacity if fits else None, most_repeats=_MOST_REPEATS if fits else 0,
    )  # fmt: skip
    return Estimate(
        source="trace", moments=moments, peak_allocated_bytes=peak.total_bytes, peak_reserved_bytes=reserved,
        device_bytes=reserved + context + traced.outside_bytes, peak_moment=peak.name,
        margin_bytes=margin_bytes("trace", peak.total_bytes),
        notes=(*_list_assumptions(workload, strategy), *traced.notes),
        tensors=list_tensors(traced.pieces, traced.storages),
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
    pieces: Sequence[Piece], *, expandable: bool = False, capacity_bytes: int | None = None,
    most_repeats: int = _MOST_REPEATS,
) -> int:  # fmt: skip
    """Return the most bytes the caching allocator reserves over a run whose second step is repeated.

    A pool is cut up differently each time until it has a block for everything: the second step is played again until
    it needs no further segment.

    Args:
        pieces: two optimizer steps.
        expandable: whether segments grow (`expandable_segments:True`).
        capacity_bytes: what the process may reserve; free segments are given back when it is reached.
        most_repeats: how often the second step is played again at most.
    """
    allocator = CachingAllocator(expandable=expandable, capacity_bytes=capacity_bytes)
    *steps, rest = split_steps(pieces)
    for step in steps:
        _play(allocator, step)
    passes = _pair_lasting(steps[1]) if len(steps) == 2 else None
    for _ in range(most_repeats if passes is not None else 0):
        reserved = allocator.peak_reserved_bytes
        for older, newer in passes or ():
            allocator.rename(newer, older)
        _play(allocator, steps[1])
        if allocator.peak_reserved_bytes == reserved:
            break
    _play(allocator, rest)
    return allocator.peak_reserved_bytes


def _play(allocator: CachingAllocator, pieces: Iterable[Piece]) -> None:
    allocate, free = allocator.allocate, allocator.free
    for piece in pieces:
        for repeat in piece.repeats:
            for key, num_bytes, _, _ in piece.write_repeat(repeat):
                if num_bytes > 0:
                    allocate(key, num_bytes)
                elif num_bytes < 0:
                    free(key)


def _pair_lasting(step: Sequence[Piece]) -> list[tuple[int, int]] | None:
    """Return storages from before the step with those that stand for them after it; None if they do not match."""
    events = [event for piece in step for repeat in piece.repeats for event in piece.write_lasting(repeat)]
    made = {event.key: event.num_bytes for event in events if event.num_bytes > 0}
    freed = {event.key: -event.num_bytes for event in events if event.num_bytes < 0}
    older = [(key, size) for key, size in freed.items() if key not in made]
    newer = [(key, size) for key, size in made.items() if key not in freed]
    if [size for _, size in older] != [size for _, size in newer]:
        return None
    return [(one, other) for (one, _), (other, _) in zip(older, newer, strict=True)]


def list_moments(pieces: Iterable[Piece], storages: Mapping[int, Storage]) -> tuple[Moment, ...]:
    """Return the highest point of each phase, in order of the step, with its ledger."""
    live = dict.fromkeys(STACKED_ROWS, 0)
    now, highest = MODEL_PHASE, 0
    best: dict[str, tuple[int, dict[str, int]]] = {}
    for events in _list_ends(pieces, live):
        total = sum(live.values())
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


def _list_ends(pieces: Iterable[Piece], live: dict[str, int]) -> Iterator[Sequence[Event]]:
    """Yield the events of the first and of the last repeat of each piece; what is alive grows by those in between."""
    for piece in pieces:
        before = live.copy()
        yield piece.events
        if len(piece.repeats) > 1:
            for row, num_bytes in live.items():
                live[row] += (len(piece.repeats) - 2) * (num_bytes - before[row])
            yield piece.events


def _ledger(live: Mapping[str, int]) -> Ledger:
    return Ledger(**{row: live.get(category, 0) for category, row in STACKED_ROWS.items()})


def list_tensors(pieces: Sequence[Piece], storages: Mapping[int, Storage]) -> tuple[HeldTensor, ...]:
    """Return what is in memory at the peak, alike tensors together, the ten largest first."""
    alike: dict[tuple[str, ...], list[Storage]] = {}
    for key, count in Counter(key % STRIDE for key in _live_at_peak(pieces)).items():
        storage = storages[key]
        place = _LAYER_NUMBER.sub(".*", storage.name or storage.module)
        kind = (STACKED_ROWS[storage.category], place, storage.dtype, storage.op, storage.line, repr(storage.shape))
        alike.setdefault(kind, []).extend([storage] * count)
    found = [_held(kind, held) for kind, held in alike.items()]
    return tuple(sorted(found, key=lambda one: -one.bytes)[:_MOST_TENSORS])


def _live_at_peak(pieces: Sequence[Piece]) -> list[int]:
    last, place, index = _find_peak(pieces)
    events = [event for piece in pieces[:last] for repeat in piece.repeats for event in piece.write_lasting(repeat)]
    piece = pieces[last]
    events += (event for repeat in piece.repeats[:place] for event in piece.write_lasting(repeat))
    events += piece.write_repeat(piece.repeats[place])[: index + 1]
    live: dict[int, None] = {}
    for key, num_bytes, _, _ in events:
        if num_bytes > 0:
            live[key] = None
        elif num_bytes < 0:
            del live[key]
    return list(live)


def _find_peak(pieces: Sequence[Piece]) -> tuple[int, int, int]:
    """Return where most is alive: in which piece, in which of its repeats, after which event."""
    total = highest = 0
    peak = 0, 0, 0
    for number, piece in enumerate(pieces):
        for place in piece.list_ends():
            height = total + place * piece.num_bytes
            for index, (_, num_bytes, phase, _) in enumerate(piece.events):
                height += num_bytes
                if height > highest and phase not in UNCOUNTED:
                    highest, peak = height, (number, place, index)
        total += len(piece.repeats) * piece.num_bytes
    return peak


def _held(kind: tuple[str, ...], held: Sequence[Storage]) -> HeldTensor:
    row, place, dtype, op, line, _ = kind
    return HeldTensor(
        bytes=sum(one.num_bytes for one in held), count=len(held), row=row, module=place, shape=held[0].shape,
        dtype=dtype, op=op, line=line,
    )  # fmt: skip

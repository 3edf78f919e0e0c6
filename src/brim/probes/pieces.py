"""A stream in pieces: what many repeats of the layers did alike is written once, with the repeats it stands for.

Whoever reads a stream of memory then needs no more time for a deeper model. The bytes alive change by the same amount
from repeat to repeat, so a piece is highest in its first repeat or in its last; and a storage that is freed in the
repeat that made it says nothing of what is alive after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from brim.probes.phases import END_OF_STEP

STRIDE = 1 << 32
"""Storages of a repeat are numbered this far from those of the one before."""


class Event(NamedTuple):
    """One change of memory: `num_bytes` above 0 allocates a storage, below 0 frees it, 0 only begins a phase."""

    key: int
    num_bytes: int
    phase: str
    layer: int = -1
    """Which of the repeated layers ran; -1 outside of them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive events, of one repeat or of several that did the same one after the other."""

    events: Sequence[Event]
    """What repeat 0 did, or would have done."""
    repeats: range = range(1)
    """The repeats that did it, in order."""
    lasting: tuple[int, ...] = ()
    """Which events are about storages that are not both made and freed here."""

    @property
    def num_bytes(self) -> int:
        """What a repeat leaves behind, bytes."""
        return sum(event.num_bytes for event in self.events)

    def list_ends(self) -> list[int]:
        """Return which of its repeats is the first and which the last, counted from 0."""
        return sorted({0, len(self.repeats) - 1})

    def write_lasting(self, repeat: int) -> list[Event]:
        """Return the lasting events of a repeat; where there is but one repeat, all events."""
        return [_shift(self.events[at], repeat) for at in self.lasting] if repeat else list(self.events)

    def write_repeat(self, repeat: int) -> Sequence[Event]:
        """Return the events of a repeat; a number is used again by the storages that live in one repeat only."""
        if not repeat:
            return self.events
        events = list(self.events)
        for at in self.lasting:
            events[at] = _shift(events[at], repeat)
        return events


def repeat_events(events: Sequence[Event], repeats: range) -> Piece:
    """Return the piece of repeats that did the same."""
    made = {event.key for event in events if event.num_bytes > 0}
    gone = {event.key for event in events if event.num_bytes < 0}
    brief = made & gone
    return Piece(events, repeats, tuple(at for at, event in enumerate(events) if event.key not in brief))


def write_out(pieces: Iterable[Piece]) -> Iterator[Event]:
    """Yield every event of every repeat, each storage with a number and each layer with a place of its own."""
    new = tuple.__new__
    for piece in pieces:
        for repeat in piece.repeats:
            offset = repeat * STRIDE
            for key, num_bytes, phase, layer in piece.events:
                yield new(Event, (key + offset, num_bytes, phase, layer + repeat if layer >= 0 else -1))


def split_steps(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Return a stream cut where optimizer steps end: what comes before the first end, then what begins with each."""
    steps: list[list[Piece]] = [[]]
    for piece in pieces:
        ends = [at for at, event in enumerate(piece.events) if not event.num_bytes and event.phase == END_OF_STEP]
        if not ends:
            steps[-1].append(piece)
            continue
        steps[-1].append(Piece(piece.events[: ends[0]]))
        steps += ([Piece(piece.events[start:stop])] for start, stop in pairwise([*ends, len(piece.events)]))
    return steps


def _shift(event: Event, repeat: int) -> Event:
    return tuple.__new__(Event, (event[0] + repeat * STRIDE, *event[1:]))

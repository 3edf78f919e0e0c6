"""The micro-batch solved: the streams of two micro-batches give that of any, since every storage is affine in it.

Leaves out: what starts at a threshold (a kernel that sorts more than 3,072 tokens, an attention kernel that a longer
row rules out); the plan's own micro-batch is traced by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import NamedTuple

from brim.cost.ledger import Ledger, Moment
from brim.probes.phases import UNCOUNTED
from brim.probes.pieces import STRIDE, Event, Piece
from brim.probes.stream import Traced, list_moments
from brim.spec.device import BLOCK_BYTES

SOLVED_AT = (2, 3)
"""Micro-batches that are traced; a single sequence is a case of its own (copies that expansion avoids)."""


class _Line(NamedTuple):
    """Bytes of a storage as a function of the micro-batch, before rounding."""

    fixed: int
    per_sequence: int

    def at(self, micro_batch_size: int) -> int:
        return self.fixed + self.per_sequence * micro_batch_size


@dataclass(frozen=True, slots=True)
class Solved:
    """The stream of a strategy for every micro-batch of at least two sequences."""

    traced: Traced
    """The smaller of the two."""
    lines: dict[int, _Line]
    """How each storage grows; those of repeats that were left out grow as those of the repeat that stands for them."""

    def trace_at(self, micro_batch_size: int) -> Traced:
        """Return the stream at a micro-batch size."""
        sizes = {key: _rounded(line.at(micro_batch_size)) for key, line in self.lines.items()}
        return replace(self.traced, pieces=[_resize(piece, sizes) for piece in self.traced.pieces])

    def peak_bytes(self, micro_batch_size: int) -> int:
        """Return the most bytes allocated at a micro-batch size."""
        return self.peak(micro_batch_size).total_bytes

    def peak(self, micro_batch_size: int) -> Moment:
        """Return the moment of the peak at a micro-batch size."""
        traced = self.trace_at(micro_batch_size)
        return max(list_moments(traced.pieces, traced.storages), key=lambda moment: moment.total_bytes)

    def largest_within(self, budget_bytes: int) -> int:
        """Return the largest micro-batch whose peak is within a budget, 0 if none is.

        Every point of the stream is a line in the micro-batch; each says how far it lets the micro-batch grow, and the
        least of them is the answer. Rounding to blocks can only take away, so the last step checks with it.
        """
        fixed = slope = 0
        most: int | None = None
        for key, num_bytes, phase, _ in self.traced.events:
            if num_bytes:
                sign = 1 if num_bytes > 0 else -1
                line = self.lines[key % STRIDE]
                fixed, slope = fixed + sign * line.fixed, slope + sign * line.per_sequence
            if phase not in UNCOUNTED and slope > 0:
                bound = (budget_bytes - fixed) // slope
                most = bound if most is None else min(most, bound)
            elif phase not in UNCOUNTED and fixed > budget_bytes:
                return 0
        found = most or 0
        while found > 0 and self.peak_bytes(found) > budget_bytes:
            found -= 1
        return max(found, 0)


def solve(small: Traced, large: Traced, sizes: tuple[int, int] = SOLVED_AT) -> Solved | None:
    """Return the stream for any micro-batch from those of two; None if they differ in more than sizes."""
    if [_outline(piece) for piece in small.pieces] != [_outline(piece) for piece in large.pieces]:
        return None
    lines: dict[int, _Line] = {}
    for one in (event for piece in small.pieces for event in piece.events):
        if one.num_bytes > 0:
            key = one.key % STRIDE
            first, second = small.storages[key].num_bytes, large.storages[key].num_bytes
            slope, rest = divmod(second - first, sizes[1] - sizes[0])
            if rest:
                return None
            lines[key] = _Line(first - slope * sizes[0], slope)
    return Solved(small, lines)


def _outline(piece: Piece) -> tuple[object, ...]:
    """Return everything about a piece but sizes."""
    events = [(event.key, event.phase, event.layer, event.num_bytes > 0) for event in _order_frees(piece.events)]
    return piece.repeats, events


def _resize(piece: Piece, sizes: Mapping[int, int]) -> Piece:
    """Return a piece with other sizes of its storages."""
    return replace(piece, events=[_resized(event, sizes) for event in piece.events])


def _resized(event: Event, sizes: Mapping[int, int]) -> Event:
    if not event.num_bytes:
        return event
    size = sizes[event.key % STRIDE]
    return event._replace(num_bytes=size if event.num_bytes > 0 else -size)


def extend_moment(small: Moment, large: Moment, sizes: tuple[int, int, int]) -> Moment:
    """Return a moment on the line through two, row by row, where their streams differ in more than sizes.

    Args:
        small: the moment at the smaller of two micro-batches.
        large: the same at the larger.
        sizes: micro-batch asked for, that of `small`, that of `large`.
    """
    wanted, first, second = sizes
    rows = {}
    for row in fields(Ledger):
        one, other = getattr(small.ledger, row.name), getattr(large.ledger, row.name)
        rows[row.name] = max(0, one + (other - one) * (wanted - first) // (second - first))
    return Moment(name=small.name, ledger=Ledger(**rows))


def _order_frees(events: Sequence[Event]) -> Iterator[Event]:
    """Yield the stream with frees that follow one another in order of birth: hash maps (autocast's cache) give up their
    tensors in any order."""
    for frees, stretch in groupby(events, key=lambda one: one.num_bytes < 0):
        yield from sorted(stretch, key=lambda one: one.key if frees else 0)


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES

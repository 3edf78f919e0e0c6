"""The micro-batch solved: the streams of two micro-batches give that of any, since every storage is affine in it.

Leaves out: what starts at a threshold (a kernel that sorts more than 3,072 tokens, an attention kernel that a longer
row rules out); the plan's own micro-batch is traced by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import NamedTuple

from brim.cost.ledger import Ledger, Moment
from brim.probes.phases import UNCOUNTED
from brim.probes.stream import Traced, list_moments
from brim.probes.tracker import BLOCK_BYTES, Event

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

    events: Sequence[Event]
    traced: Traced
    """The smaller of the two, for what its storages are."""
    lines: dict[int, _Line]

    def trace_at(self, micro_batch_size: int) -> Traced:
        """Return the stream at a micro-batch size."""
        sizes = {key: _rounded(line.at(micro_batch_size)) for key, line in self.lines.items()}
        events = [
            Event(key, 0 if not num_bytes else sizes[key] if num_bytes > 0 else -sizes[key], phase, layer)
            for key, num_bytes, phase, layer in self.events
        ]
        return replace(self.traced, events=events)

    def peak_bytes(self, micro_batch_size: int) -> int:
        """Return the most bytes allocated at a micro-batch size."""
        return self.peak(micro_batch_size).total_bytes

    def peak(self, micro_batch_size: int) -> Moment:
        """Return the moment of the peak at a micro-batch size."""
        traced = self.trace_at(micro_batch_size)
        return max(list_moments(traced.events, traced.storages), key=lambda moment: moment.total_bytes)

    def largest_within(self, budget_bytes: int) -> int:
        """Return the largest micro-batch whose peak is within a budget, 0 if none is.

        Every point of the stream is a line in the micro-batch; each says how far it lets the micro-batch grow, and the
        least of them is the answer. Rounding to blocks can only take away, so the last step checks with it.
        """
        fixed = slope = 0
        most: int | None = None
        for key, num_bytes, phase, _ in self.events:
            if num_bytes:
                sign = 1 if num_bytes > 0 else -1
                fixed, slope = fixed + sign * self.lines[key].fixed, slope + sign * self.lines[key].per_sequence
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
    if len(small.events) != len(large.events):
        return None
    lines: dict[int, _Line] = {}
    for one, other in zip(_order_frees(small.events), _order_frees(large.events), strict=True):
        if (one.key, one.phase, one.layer, one.num_bytes > 0) != (other.key, other.phase, other.layer,
                                                                  other.num_bytes > 0):  # fmt: skip
            return None
        if one.num_bytes > 0:
            first, second = small.storages[one.key].num_bytes, large.storages[one.key].num_bytes
            slope, rest = divmod(second - first, sizes[1] - sizes[0])
            if rest:
                return None
            lines[one.key] = _Line(first - slope * sizes[0], slope)
    return Solved(small.events, small, lines)


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

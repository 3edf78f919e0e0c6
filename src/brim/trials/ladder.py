"""What is known of strategies that were not run, from predictions and from those that were: a range of bytes, a time.

Strategies that differ in the split alone are one kind. Within a kind memory and time follow the prediction's shape, and
what was measured says by how much it is off; between kinds the errors of one model on one machine are much alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import log
from statistics import median

from brim.planner.candidates import knobs_of
from brim.spec.strategy import Strategy

UNTRIED_SPREAD = 0.5
"""How far a prediction may be off before anything was run on this machine: nothing public is within less on broad sets
of runs, so the first step is taken where half as much again would still fit."""
_LEAST_SPREAD = 0.1
"""How far growth may be off where the prediction was right."""
_OTHER_KIND = 0.12
"""How far another kind's error may be from this kind's."""
_NEAR_SLOPE = 0.1
"""How far the growth beyond two runs may be from that between them."""
_CLOSE = 8.0
"""Runs whose micro-batches are at most so many times apart are searched between."""
SPILLED_FRACTION = 0.25
"""How much longer the same batch may take in larger micro-batches. A larger one saves launches and fills the card
better, so by the time law of cost/steptime.py it takes less; memory over a bus takes several times as long."""
TELLING = 1.02
"""Predictions closer than this say nothing of how memory grows: the peak lies where the micro-batch plays no part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A strategy as it was predicted."""

    strategy: Strategy
    """The strategy."""
    peak_bytes: int
    """Predicted allocated peak."""
    seconds: float
    """Predicted seconds of an optimizer step, or a relative cost in their place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What running a strategy for a few steps showed."""

    strategy: Strategy
    """The strategy."""
    fits: bool
    """Whether it ran within the card: no out-of-memory, no retry of the allocator, no spill."""
    problem: str = ""
    """Why it does not fit; empty if it does."""
    died: bool = False
    """Whether it ended in an out-of-memory or a crash."""
    peak_bytes: int | None = None
    """Allocated peak; None if it died."""
    held_bytes: int | None = None
    """Most that the allocator held, which is what has to fit; None if it died."""
    seconds: float | None = None
    """Seconds of an optimizer step of the effective batch; None if it died."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes that a strategy may hold: at least, most likely, at most."""

    low: float
    likely: float
    high: float


@dataclass(slots=True)
class Ladder:
    """Every candidate, and what running some of them has taught."""

    candidates: Sequence[Candidate]
    spread: float = UNTRIED_SPREAD
    tried: dict[Strategy, Outcome] = field(default_factory=dict)

    def kind(self, one: Candidate | Outcome) -> Strategy:
        """Return the knobs of a strategy, its split left out."""
        return knobs_of(one.strategy)

    def kin(self, one: Candidate | Outcome) -> list[Candidate]:
        """Return every candidate of a kind."""
        return [other for other in self.candidates if self.kind(other) == self.kind(one)]

    def ran(self, one: Candidate | Outcome) -> list[Candidate]:
        """Return the candidates of a kind that were run."""
        return [other for other in self.kin(one) if other.strategy in self.tried]

    def note(self, outcome: Outcome) -> None:
        """Learn from a run. One that took clearly longer than a smaller micro-batch of its kind does not fit."""
        self.tried[outcome.strategy] = outcome
        for one in [outcome, *(self.tried[other.strategy] for other in self.ran(outcome))]:
            self.tried[one.strategy] = self._refuse_slower(one)

    def _refuse_slower(self, outcome: Outcome) -> Outcome:
        """Return a run as it counts beside its neighbours: a larger micro-batch that is slower has left the device's
        own memory, whatever its driver says of that (WDDM and unified memory spill to the host without a word)."""
        if not outcome.fits or outcome.seconds is None:
            return outcome
        size = outcome.strategy.micro_batch_size
        for one in self.ran(outcome):
            other = self.tried[one.strategy]
            smaller = one.strategy.micro_batch_size < size and other.fits and other.seconds is not None
            if smaller and outcome.seconds > other.seconds * (1 + SPILLED_FRACTION):  # type: ignore[operator]
                text = f"slower than micro-batch {one.strategy.micro_batch_size}: spilled to host memory, or thrashing"
                return replace(outcome, fits=False, problem=text)
        return outcome

    def range_of(self, candidate: Candidate) -> Range:
        """Return the bytes that an untried candidate may hold."""
        points = self._list_points(self.kin(candidate))
        below = [point for point in points if point[0] < candidate.peak_bytes]
        above = [point for point in points if point[0] >= candidate.peak_bytes]
        if len(below) > 1 and below[-1][0] > below[0][0] * TELLING:
            first = max(point for point in below if below[-1][0] > point[0] * TELLING)
            return _from_two(first, below[-1], candidate.peak_bytes)
        if below:
            return self._from_one(below[-1], candidate)
        if above:  # less than something that was measured
            held = above[0][1]
            return Range(0.0, held * candidate.peak_bytes / above[0][0], held)
        ratios = [held / predicted for predicted, held in self._list_points(self.candidates)]
        likely = candidate.peak_bytes * (median(ratios) if ratios else 1.0)
        spread = min(_OTHER_KIND, self.spread) if ratios else self.spread
        return Range(likely / (1 + spread), likely, likely * (1 + spread))

    def seconds_of(self, candidate: Candidate) -> float:
        """Return the likely time of an untried candidate: as predicted, times what predictions were off nearby."""
        near = self._list_ratios(self.ran(candidate)) or self._list_ratios(self.candidates)
        if not near:
            return candidate.seconds
        size = log(candidate.strategy.micro_batch_size)
        below = [pair for pair in near if pair[0] <= size]
        above = [pair for pair in near if pair[0] > size]
        if below and above:
            (x, low), (y, high) = below[-1], above[0]
            if y - x > log(_CLOSE):
                return candidate.seconds * (low + (high - low) * (size - x) / (y - x))
            return candidate.seconds * min(low, high)  # where speed falls off may lie anywhere between
        return candidate.seconds * (below[-1] if below else above[0])[1]

    def fails(self, candidate: Candidate) -> bool:
        """Whether a smaller micro-batch of its kind did not fit."""
        size = candidate.strategy.micro_batch_size
        failed = [one for one in self.ran(candidate) if not self.tried[one.strategy].fits]
        return any(one.strategy.micro_batch_size <= size for one in failed)

    def lowest_bytes(self, candidate: Candidate) -> int:
        """Return the lowest prediction of a candidate's kind: what does not grow with the micro-batch is in it."""
        return min(one.peak_bytes for one in self.kin(candidate))

    def _from_one(self, point: tuple[int, int], candidate: Candidate) -> Range:
        """Beyond one run: all of the prediction may be off alike, or the growing part alone, or the fixed part."""
        predicted, held = point
        grows, ratio = candidate.peak_bytes - predicted, held / predicted
        fixed = self.lowest_bytes(candidate)
        if predicted > fixed * TELLING and held > fixed:
            steepest = max(ratio, (held - fixed) / (predicted - fixed), 1.0)
        else:  # nothing of what grows has been seen
            steepest = max(ratio, 1.0) * (1 + self._spread_after(ratio))
        likely, least = held + grows * ratio, held + grows * min(ratio, 1.0) * 0.9
        return Range(least, likely, held + grows * min(steepest, ratio * (1 + self._spread_after(ratio))))

    def _spread_after(self, ratio: float) -> float:
        """How far growth may be off, after a run that was off by a ratio: who was right there is trusted further."""
        return min(self.spread, max(_LEAST_SPREAD, 3 * abs(log(ratio))))

    def _list_points(self, candidates: Sequence[Candidate]) -> list[tuple[int, int]]:
        """Return (predicted, held) of the candidates that ran to their end, in order of size."""
        ran = [(one.peak_bytes, self.tried[one.strategy]) for one in candidates if one.strategy in self.tried]
        return sorted((predicted, outcome.held_bytes) for predicted, outcome in ran if outcome.held_bytes is not None)

    def _list_ratios(self, candidates: Sequence[Candidate]) -> list[tuple[float, float]]:
        """Return (logarithm of the micro-batch, measured over predicted seconds) of the candidates that fit."""
        ran = [(one, self.tried[one.strategy]) for one in candidates if one.strategy in self.tried]
        return sorted(
            (log(one.strategy.micro_batch_size), outcome.seconds / one.seconds)
            for one, outcome in ran if outcome.fits and outcome.seconds is not None
        )  # fmt: skip


def _from_two(first: tuple[int, int], second: tuple[int, int], predicted: int) -> Range:
    """Beyond two runs: the line through them."""
    slope = max((second[1] - first[1]) / max(second[0] - first[0], 1), 0.0)
    grows = predicted - second[0]
    slack = _NEAR_SLOPE * grows * max(slope, second[1] / second[0])
    likely = second[1] + grows * slope
    return Range(likely - slack, likely, likely + slack)

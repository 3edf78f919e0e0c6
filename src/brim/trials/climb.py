"""Find the fastest strategy that fits on this machine in a few runs: predict, step where it is safe, correct, jump.

A run costs seconds, an out-of-memory ten times as much, so the next run is the one that is expected to be fastest, if
it fits even at the far end of what is known; else a smaller one of its kind, which narrows that. It ends when nothing
that may fit is expected to be faster than what ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

from brim.spec.strategy import Strategy
from brim.trials.ladder import TELLING, UNTRIED_SPREAD, Candidate, Ladder, Outcome

Run = Callable[[Strategy], Outcome]

FASTER_FRACTION = 0.005
"""A candidate must be expected to save more than this to be worth a run."""
SMALLER_FRACTION = 0.3
"""How much slower a smaller micro-batch may be expected to be and still be worth a run."""
OTHER_KIND_FRACTION = 0.08
"""The same for strategies that differ in more than the micro-batch."""
RISK_FRACTION = 0.3
"""How much of the way from the likely to the highest peak must fit where nothing safe is left to learn from."""
_MOST_RUNS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Climb:
    """What was run, and the choice."""

    best: Outcome | None
    """The fastest that fits; None if nothing that was run does."""
    tried: tuple[Outcome, ...]
    """Every run, in order."""
    reason: str
    """Why it ended."""

    @property
    def num_ooms(self) -> int:
        """Runs that died."""
        return sum(outcome.died for outcome in self.tried)


def climb(
    candidates: Sequence[Candidate], run: Run, limit_bytes: int, *, spread: float = UNTRIED_SPREAD,
    most_runs: int = _MOST_RUNS,
) -> Climb:  # fmt: skip
    """Return the fastest strategy that fits, tried on the device.

    Args:
        candidates: strategies with their predicted peak and time.
        run: runs a strategy for a few steps.
        limit_bytes: what the allocator may hold, bytes.
        spread: how far the predictions may be off, as a fraction; what history knows of this card, if it does.
        most_runs: runs after which the best so far is taken.
    """
    ladder = Ladder(candidates, spread)
    reason = f"{most_runs} runs"
    for _ in range(most_runs):
        following = pick_next(ladder, limit_bytes)
        if following is None:
            reason = "nothing that may fit is expected to be faster"
            break
        ladder.note(run(following.strategy))
    return Climb(best=find_best(ladder), tried=tuple(ladder.tried.values()), reason=reason)


def find_best(ladder: Ladder) -> Outcome | None:
    """Return the fastest run that fits; None if there is none."""
    fitting = [one for one in ladder.tried.values() if one.fits and one.seconds is not None]
    return min(fitting, key=_seconds, default=None)


def _seconds(outcome: Outcome | None) -> float:
    """Return the time of a run; endless where there is none."""
    return float("inf") if outcome is None or outcome.seconds is None else outcome.seconds


def pick_next(ladder: Ladder, limit_bytes: int) -> Candidate | None:
    """Return what to run next; None when no run is worth its time."""
    best = find_best(ladder)
    if ladder.tried and best is None:
        return find_lightest(ladder)  # the prediction is far off: nothing in between is worth a second failure
    for target in list_hopeful(ladder, limit_bytes, best):
        seen = ladder.range_of(target)
        if seen.high <= limit_bytes:
            return target
        narrower = _find_narrower(ladder, target, limit_bytes)
        if narrower is not None:
            return narrower
        if seen.likely + RISK_FRACTION * (seen.high - seen.likely) <= limit_bytes:
            return target
    if best is None:
        return find_lightest(ladder)
    return find_smaller(ladder, best) or find_other_kind(ladder, limit_bytes, best)


def find_lightest(ladder: Ladder) -> Candidate | None:
    """Return the untried candidate of the lowest peak; None if even such a one did not fit."""
    lightest = min(ladder.candidates, key=lambda one: one.peak_bytes)
    return None if lightest.strategy in ladder.tried else lightest


def find_smaller(ladder: Ladder, best: Outcome) -> Candidate | None:
    """Return a much smaller micro-batch of the best one's kind: the largest that fits is not always the fastest, and no
    prediction says so. None where such a one was run, or is expected to be far slower."""
    size = best.strategy.micro_batch_size
    if any(one.strategy.micro_batch_size <= size / 4 for one in ladder.ran(best)):
        return None
    smaller = [
        one for one in ladder.kin(best)
        if one.strategy.micro_batch_size <= size / 2 and one.strategy not in ladder.tried
    ]  # fmt: skip
    middle = min(smaller, key=lambda one: abs(log(one.strategy.micro_batch_size) - log(size) / 2), default=None)
    slowest = _seconds(best) * (1 + SMALLER_FRACTION)
    return middle if middle is not None and ladder.seconds_of(middle) <= slowest else None


def find_other_kind(ladder: Ladder, limit_bytes: int, best: Outcome) -> Candidate | None:
    """Return the fastest safe candidate of a kind that never ran and is expected to be hardly slower than the best: how
    time falls with the micro-batch is the prediction's weakest part, and kinds are compared across it."""
    slowest = _seconds(best) * (1 + OTHER_KIND_FRACTION)
    found = [
        one for one in ladder.candidates
        if not ladder.ran(one) and ladder.seconds_of(one) <= slowest and ladder.range_of(one).high <= limit_bytes
    ]  # fmt: skip
    return min(found, key=ladder.seconds_of, default=None)


def list_hopeful(ladder: Ladder, limit_bytes: int, best: Outcome | None) -> list[Candidate]:
    """Return untried candidates that may fit and are expected to be faster than the best run, fastest first."""
    below = _seconds(best) * (1 - FASTER_FRACTION)
    found = [
        (ladder.seconds_of(one), one) for one in ladder.candidates
        if one.strategy not in ladder.tried and not ladder.fails(one) and ladder.range_of(one).low <= limit_bytes
    ]  # fmt: skip
    return [one for seconds, one in sorted(found, key=lambda pair: pair[0]) if seconds < below]


def _find_narrower(ladder: Ladder, target: Candidate, limit_bytes: int) -> Candidate | None:
    """Return the largest safe candidate that tells more of a target: of its kind, else, if nothing ran yet, of any."""
    safe = [
        one for one in ladder.candidates
        if one.strategy not in ladder.tried and one.peak_bytes < target.peak_bytes and not ladder.fails(one)
        and ladder.range_of(one).high <= limit_bytes and _tells(ladder, one)
    ]  # fmt: skip
    mine = [one for one in safe if ladder.kind(one) == ladder.kind(target)]
    others = [] if ladder.tried else safe
    return max(mine or others, key=lambda one: (one.peak_bytes, one.strategy.micro_batch_size), default=None)


def _tells(ladder: Ladder, one: Candidate) -> bool:
    """Whether running a candidate would show more than what ran: it lies well above the largest of its kind."""
    return one.peak_bytes > max((other.peak_bytes for other in ladder.ran(one)), default=0) * TELLING

"""The numbers that ranks tell each other about a run, and those of the worst rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

UNKNOWN = -1.0


class Numbers(NamedTuple):
    """What one rank has measured; -1 is what it cannot say. Ranks gather these as they stand."""

    allocated_bytes: float = UNKNOWN
    """Peak of tensors, evaluation included."""
    trained_bytes: float = UNKNOWN
    """Peak of tensors in training steps."""
    reserved_bytes: float = UNKNOWN
    """Peak of what the allocator held."""
    device_bytes: float = UNKNOWN
    """Most in use on the card."""
    num_retries: float = 0.0
    """Emptied pools."""
    num_ooms: float = 0.0
    """Refused allocations."""
    longest_tokens: float = UNKNOWN
    """Longest sequence, padding included."""
    step_seconds: float = UNKNOWN
    """One optimizer step."""
    run_tokens: float = UNKNOWN
    """Tokens of an optimizer step, padding included."""
    real_tokens: float = UNKNOWN
    """Real tokens of an optimizer step."""
    first_token_seconds: float = UNKNOWN
    """Time of a token in the first steps."""
    token_seconds: float = UNKNOWN
    """The same lately."""
    capacity_bytes: float = UNKNOWN
    """Memory of the card."""


class Worst(NamedTuple):
    """The worst rank's numbers, and which one has the highest peak."""

    numbers: Numbers
    rank: int
    num_ranks: int


def find_worst(rows: Sequence[Sequence[float]]) -> Worst:
    """Return the worst of each number over ranks.

    Peaks, counts and times are the largest; tokens are those of the rank that runs the most; the card is the smallest;
    the time of a token is that of the rank that slowed down the most.
    """
    ranks = [Numbers(*row) for row in rows]
    most = Numbers(*(max(column) for column in zip(*ranks, strict=True)))
    busiest = max(ranks, key=lambda one: one.run_tokens)
    slowed = max(ranks, key=lambda one: one.token_seconds / one.first_token_seconds)
    capacities = [one.capacity_bytes for one in ranks if one.capacity_bytes > 0]
    numbers = most._replace(
        run_tokens=busiest.run_tokens, real_tokens=busiest.real_tokens, token_seconds=slowed.token_seconds,
        first_token_seconds=slowed.first_token_seconds, capacity_bytes=min(capacities, default=UNKNOWN),
    )  # fmt: skip
    rank = max(range(len(ranks)), key=lambda index: (ranks[index].allocated_bytes, -index))
    return Worst(numbers=numbers, rank=rank, num_ranks=len(ranks))

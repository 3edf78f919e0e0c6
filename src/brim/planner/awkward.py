"""Effective batches that split badly: a prime number of sequences is run one by one, or all at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from brim.planner.answerer import Answerer
from brim.planner.batch import nearest_multiples, ranks_text
from brim.planner.candidates import Fixed, list_splits
from brim.planner.record import PlanWarning
from brim.planner.search import Costed, search
from brim.spec.workload import Workload

WORTH_FRACTION = 0.10
"""A neighbour that is faster per sequence by less is not worth changing the effective batch."""
FARTHEST_FRACTION = 0.25
"""A multiple of 8 farther away than this share is another batch, not a neighbour."""
_UNIT = 8
_SPLIT = ("micro_batch_size", "gradient_accumulation_steps")


def list_awkward(workload: Workload, fixed: Fixed, best: Costed, answerer: Answerer) -> tuple[PlanWarning, ...]:
    """Return a warning when a neighbouring effective batch would be more than 10 % faster per sequence.

    The nearest multiples of 8 sequences per rank are searched once each. Nothing is said where the speed is unknown,
    where the user fixed the split, or where the whole batch is one micro-batch.
    """
    ranks = best.strategy.mesh.data_parallel_size
    local = workload.batch.sequences // ranks
    chosen_freely = not any(name in fixed for name in _SPLIT) and best.strategy.gradient_accumulation_steps > 1
    if best.seconds is None or not chosen_freely or local % _UNIT == 0 or not _splits_badly(workload, fixed):
        return ()
    neighbours = _neighbours(workload, fixed, best, answerer, local, ranks)
    # Of two that gain the same, the nearer one.
    faster = max(neighbours, key=lambda row: (round(row[0], 2), -abs(row[1] - workload.batch.sequences)), default=None)
    if faster is None or faster[0] <= 1 + WORTH_FRACTION:
        return ()
    return (PlanWarning(code="awkward_batch", text=_text(workload, fixed, best, *faster)),)


def _splits_badly(workload: Workload, fixed: Fixed) -> bool:
    """Whether some step from one possible micro-batch to the next is more than a doubling."""
    sizes = [micro for micro, _ in list_splits(workload, fixed)]
    return any(larger > 2 * smaller for smaller, larger in pairwise(sizes))


def _neighbours(
    workload: Workload, fixed: Fixed, best: Costed, answerer: Answerer, local: int, ranks: int
) -> Iterator[tuple[float, int, int]]:
    """Yield how many times faster per sequence a neighbour is, its sequences and its micro-batch."""
    if best.seconds is None:
        return
    for near in nearest_multiples(local, _UNIT):
        if abs(near - local) > FARTHEST_FRACTION * local:
            continue
        sequences = near * ranks
        batch = replace(workload.batch, sequences=sequences, tokens=sequences * workload.data.seq_len)
        moved = replace(workload, batch=batch)
        found = search(moved, fixed, answerer, answerer.budget(moved).budget_bytes).best
        if found is None or not found.seconds:
            continue
        micro = found.strategy.micro_batch_size
        if micro > best.strategy.micro_batch_size:
            yield (best.seconds / workload.batch.sequences) / (found.seconds / sequences), sequences, micro


def _text(workload: Workload, fixed: Fixed, best: Costed, ratio: float, sequences: int, micro: int) -> str:
    asked, ranks = workload.batch.sequences, best.strategy.mesh.data_parallel_size
    sizes = [str(size) for size, _ in list_splits(workload, fixed)]
    shown = ", ".join(sizes if len(sizes) <= 6 else [*sizes[:3], "...", *sizes[-2:]])
    return (
        f"effective batch {asked:,} over {ranks_text(ranks)} splits only into micro-batches of {shown}: {sequences:,} "
        f"instead of {asked:,} sequences would be {ratio:.2f}x faster per sequence, with micro-batch {micro} instead "
        f"of {best.strategy.micro_batch_size}"
    )

"""Exact batch arithmetic: effective = micro-batch x accumulation x data-parallel ranks, never rounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

from brim.errors import IndivisibleBatch, InvalidInput
from brim.spec.workload import BatchTarget
from brim.tables.read import Task

_ROUNDED = "do not split exactly; nearest:"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """What the user said about the batch; None where nothing was said."""

    sequences: int | None = None
    """Effective batch, sequences."""
    tokens: int | None = None
    """Effective batch, tokens at the planned length."""
    micro_batch_size: int | None = None
    """Fixed sequences per rank per forward."""
    gradient_accumulation_steps: int | None = None
    """Fixed micro-batches per optimizer step."""


def exact_splits(sequences: int, ranks: int) -> Iterator[tuple[int, int]]:
    """Yield every (micro-batch, accumulation) whose product with `ranks` is exactly `sequences`, smallest first.

    Args:
        sequences: effective batch, sequences.
        ranks: data-parallel ranks.
    """
    local, rest = divmod(sequences, ranks)
    if rest or local < 1:
        return
    small = [divisor for divisor in range(1, isqrt(local) + 1) if local % divisor == 0]
    large = [local // divisor for divisor in reversed(small) if divisor * divisor != local]
    for micro in small + large:
        yield micro, local // micro


def is_power_of_two(number: int) -> bool:
    """Return whether a positive number is a power of two."""
    return number & (number - 1) == 0


def nearest_multiples(number: int, unit: int) -> tuple[int, ...]:
    """Return the multiples of `unit` just below and above `number`, without zero; `number` itself if it is one."""
    below = number // unit * unit
    around = (below,) if below == number else (below, below + unit)
    return tuple(choice for choice in around if choice > 0)


def choose_batch(request: BatchRequest, task: Task, *, seq_len: int, ranks: int) -> BatchTarget:
    """Return the effective batch to keep: the user's number, else the low end of the task's optimal range.

    Args:
        request: what the user fixed; micro-batch and accumulation alone also fix the product.
        task: ranges in sequences.
        seq_len: planned length, tokens.
        ranks: data-parallel ranks.

    Raises:
        IndivisibleBatch: the user's number does not split; the nearest that do are named.
        InvalidInput: numbers that contradict each other, or tokens that are not one sequence per rank.
    """
    sequences, reason = _requested(request, task, seq_len, ranks)
    _refuse_indivisible(sequences, request, ranks)
    return BatchTarget(
        sequences=sequences, tokens=sequences * seq_len, low=task.low, high=task.high,
        min_useful=task.min, max_useful=task.max, reason=reason,
    )  # fmt: skip


def _requested(request: BatchRequest, task: Task, seq_len: int, ranks: int) -> tuple[int, str]:
    micro, steps = request.micro_batch_size, request.gradient_accumulation_steps
    unit = ranks * (micro or 1) * (steps or 1)
    if request.sequences is not None and request.tokens is not None:
        raise InvalidInput(
            f"effective batch given twice, {request.sequences:,} sequences and {request.tokens:,} tokens; give one"
        )
    if request.sequences is not None:
        return request.sequences, "given by the user"
    if request.tokens is not None:
        return _from_tokens(request.tokens, seq_len, unit)
    if micro and steps:
        return unit, f"micro-batch {micro} x accumulation {steps} x {ranks_text(ranks)}, both given by the user"
    return _from_task(task, unit, ranks)


def _from_tokens(tokens: int, seq_len: int, unit: int) -> tuple[int, str]:
    if tokens < seq_len * unit:
        raise InvalidInput(
            f"effective batch {tokens:,} tokens is less than the {unit:,} sequence{'s' if unit > 1 else ''} of "
            f"{seq_len:,} tokens one step takes at least; smallest: {seq_len * unit:,} tokens",
            tokens=tokens, smallest=seq_len * unit,
        )  # fmt: skip
    exact = nearest_multiples(max(1, round(tokens / seq_len)), unit)
    sequences = min(exact, key=lambda choice: abs(choice * seq_len - tokens))
    whole = f"{sequences:,} sequences of {seq_len:,} tokens"
    if sequences * seq_len == tokens:
        return sequences, f"{tokens:,} tokens given by the user: {whole}"
    return sequences, f"{tokens:,} tokens given by the user {_ROUNDED} {whole} = {sequences * seq_len:,} tokens"


def is_rounded(batch: BatchTarget) -> bool:
    """Return whether the tokens the user gave are not exactly those of the batch; `reason` has both numbers."""
    return _ROUNDED in batch.reason


def _from_task(task: Task, unit: int, ranks: int) -> tuple[int, str]:
    sequences = -(-task.low // unit) * unit
    reason = f"low end of the optimal range of {task.name}, {task.low}-{task.high} sequences"
    if sequences != task.low:
        reason += f"; {sequences} is the next above {task.low} that splits exactly over {ranks_text(ranks)}"
        reason += f" in units of {unit}" if unit != ranks else ""
    return sequences, reason


def _refuse_indivisible(sequences: int, request: BatchRequest, ranks: int) -> None:
    micro, steps = request.micro_batch_size, request.gradient_accumulation_steps
    unit = ranks * (micro or 1) * (steps or 1)
    if micro and steps and sequences != unit:
        raise InvalidInput(
            f"effective batch {sequences:,} sequences is not micro-batch {micro} x accumulation {steps} x "
            f"{ranks_text(ranks)} = {unit:,} sequences; leave one of them out",
            sequences=sequences, product=unit,
        )  # fmt: skip
    if sequences % unit == 0:
        return
    nearest = nearest_multiples(sequences, unit)
    if steps:
        raise InvalidInput(
            f"effective batch {sequences:,} sequences cannot be split over {ranks_text(ranks)} in {steps} "
            f"accumulation steps; nearest: {' or '.join(str(near) for near in nearest)}",
            sequences=sequences, ranks=ranks, gradient_accumulation_steps=steps, nearest=list(nearest),
        )  # fmt: skip
    raise IndivisibleBatch(sequences=sequences, ranks=ranks, micro_batch_size=micro, nearest=nearest)


def ranks_text(ranks: int) -> str:
    """Return `1 rank` or `8 ranks`."""
    return f"{ranks} rank{'s' if ranks != 1 else ''}"

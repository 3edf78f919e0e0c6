"""Cutting micro-batches into smaller ones, so that the same sequences take less memory at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from brim.losses.rules import count_rows
from brim.losses.views import take_rows

Inputs = Mapping[str, Any]


def count_sequences(inputs: Inputs, blocks: int = 1) -> int:
    """Return how many sequences (pairs, where rows are stacked in two blocks) a micro-batch has."""
    return max(count_rows(inputs) // blocks, 1)


def cut_pieces(inputs: Inputs, size: int | None, blocks: int = 1) -> list[Inputs]:
    """Return a micro-batch in pieces of at most `size` sequences; itself where it is no larger or cannot be cut.

    Args:
        inputs: keyword arguments of the model, rows first.
        size: most sequences of a piece; None leaves it whole.
        blocks: rows that belong to a sequence, stacked: 2 where all chosen rows come before all rejected ones.
    """
    rows = count_rows(inputs)
    if size is None or rows // blocks <= size or explain_uncuttable(inputs, blocks) is not None:
        return [inputs]
    return [_take(inputs, rows, blocks, start, start + size) for start in range(0, rows // blocks, size)]


def explain_uncuttable(inputs: Inputs, blocks: int = 1) -> str | None:
    """Return why a micro-batch cannot be cut by rows; None if it can."""
    rows = count_rows(inputs)
    if rows % blocks or rows // blocks < 2:
        return "it is one row (a single sequence, or several packed into one)"
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] not in (1, rows, rows // blocks):
            return f"{key} has {value.shape[0]} rows beside {rows} of the others"
    return None


def most_sequences(batches: Sequence[Inputs], blocks: int = 1) -> int:
    """Return how many sequences the largest of some micro-batches has."""
    return max((count_sequences(batch, blocks) for batch in batches), default=1)


def _take(inputs: Inputs, rows: int, blocks: int, start: int, stop: int) -> dict[str, Any]:
    """Return some sequences; lists with an entry a row are cut as tensors are."""
    size = rows // blocks
    taken = take_rows(inputs, rows, blocks, start, min(stop, size))
    for key, value in inputs.items():
        if isinstance(value, (list, tuple)) and len(value) == size:
            taken[key] = value[start:stop]
    return taken

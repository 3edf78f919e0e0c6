"""The longest row of a dataset, and a dataset of nothing but it: the worst case by length, made of real tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from brim.errors import ProbeFailed
from brim.runtime.lengths import count_tokens

_MOST_ROWS = 20_000
"""Rows that are looked at; of more, every so many-th."""


class _Repeated(Sequence[Any]):
    """One row, many times."""

    def __init__(self, row: Any, count: int) -> None:
        self._row, self._count = row, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._row for _ in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._row


def find_longest(dataset: Any) -> tuple[Any, int, int]:
    """Return rows, the index of the longest among them, and its tokens; 0 tokens where rows are no text.

    Args:
        dataset: the trainer's own, with a length or without.

    Raises:
        ProbeFailed: there is none, or it is empty.
    """
    if dataset is None:
        raise ProbeFailed("the trainer has no train_dataset, and a trial needs its longest row")
    rows = dataset if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") else list(islice(dataset, 512))
    if not len(rows):
        raise ProbeFailed("the trainer's train_dataset has no row")
    step = -(-len(rows) // _MOST_ROWS)
    lengths = {index: count_tokens(rows[index]) for index in range(0, len(rows), step)}
    index = max(lengths, key=lambda one: lengths[one])
    return rows, index, lengths[index]


def repeat_row(dataset: Any, index: int, count: int) -> Any:
    """Return a dataset of one row, many times, of the same kind where the kind can select."""
    if hasattr(dataset, "select"):
        return dataset.select([index] * count)
    return _Repeated(dataset[index], count)

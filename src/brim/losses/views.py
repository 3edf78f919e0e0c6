"""Batches to measure a loss on: the same one with other labels, and the same one in two parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from brim.losses.rules import IGNORED, count_rows, is_target

Inputs = Mapping[str, Any]


class Parts(NamedTuple):
    """A batch and the two that it is made of."""

    whole: Inputs
    first: Inputs
    second: Inputs
    layout: str = "collated"
    """How it was cut: where a layout is right, every cut in it is."""

    @property
    def batches(self) -> tuple[Inputs, Inputs, Inputs]:
        """The whole and its two parts."""
        return self.whole, self.first, self.second


def vary_labels(inputs: Inputs, ignored: int = IGNORED) -> Iterator[dict[str, Any]]:
    """Yield the batch with labels under which the counting rules count differently.

    On real data they may agree: where no prompt is trained on, position 0 is never a target, and a shifted and an
    unshifted count are the same number until the day they are not.

    Args:
        inputs: the batch.
        ignored: target that the loss leaves out; any other number there may be out of its range.
    """
    yield _relabel(inputs, lambda labels: _set_first(labels, ignored, rows=1, dropped=1))
    yield _relabel(inputs, lambda labels: _set_first(labels, ignored, rows=labels.shape[0], dropped=2))


def split_labels(inputs: Inputs) -> Parts | None:
    """Return the batch with some of its labels, with some others, and with both; None where rows are too short.

    What the model computes is the same in all three, only what its loss averages over differs: this measures a count
    without a look inside. Position 0 is in the first part alone.
    """
    key = next((key for key, value in inputs.items() if is_target(key, value) and value.dim() == 2), None)
    if key is None:
        return None
    labels = inputs[key]
    row = int(labels.ne(IGNORED).sum(dim=1).argmax())
    places = [place for place in labels[row].ne(IGNORED).nonzero().flatten().tolist() if place][:3]
    if len(places) < 3:
        return None
    groups = ((0, places[0]), places[1:])
    first, second = (_keep_only(labels, row, group) for group in groups)
    both = torch.where(first.eq(IGNORED), second, first)
    return Parts(*({**inputs, key: part} for part in (both, first, second)))


def split_rows(inputs: Inputs) -> Iterator[Parts]:
    """Yield the batch cut in two by rows, in each of the ways that its layout may have.

    Preference trainers stack the chosen rows on the rejected ones: there a pair is row i and row i + n/2.
    """
    rows = count_rows(inputs)
    for blocks in (1, 2):
        pairs = rows // blocks
        if pairs >= 2 and rows % blocks == 0:
            for cut in dict.fromkeys((max(pairs // 3, 1), pairs // 2)):
                first, second = (take_rows(inputs, rows, blocks, *ends) for ends in ((0, cut), (cut, pairs)))
                yield Parts(inputs, first, second, f"rows in {blocks}")


def repeat_row(inputs: Inputs) -> dict[str, Any]:
    """Return a batch of one row with that row twice: over one term a sum and a mean are the same number."""

    def twice(value: Any) -> Any:
        per_row = isinstance(value, Tensor) and value.dim() and value.shape[0] == 1
        return torch.cat([value, value]) if per_row else value

    return {key: twice(value) for key, value in inputs.items()}


def take_rows(inputs: Inputs, rows: int, blocks: int, start: int, stop: int) -> dict[str, Any]:
    """Return pairs `start` to `stop` of each of the stacked blocks; what has no row dimension stays whole."""
    size = rows // blocks

    def take(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] not in (rows, size):
            return value
        stacked = value.shape[0] // size
        return torch.cat([value[block * size + start : block * size + stop] for block in range(stacked)])

    return {key: take(value) for key, value in inputs.items()}


def _relabel(inputs: Inputs, change: Any) -> dict[str, Any]:
    return {key: change(value.clone()) if is_target(key, value) else value for key, value in inputs.items()}


def _set_first(labels: Tensor, ignored: int, *, rows: int, dropped: int) -> Tensor:
    """Make position 0 of some rows a target and a few others none, so that every rule counts another number."""
    if labels.dim() == 1:
        if len(labels) > dropped and ignored == IGNORED:
            labels[:dropped] = ignored
        return labels
    value = labels[labels.ne(ignored)][0] if labels.ne(ignored).any() else 0
    if labels.ne(ignored).sum() < 2 * dropped + 2:  # hardly a target: make some
        labels[0] = value
    counted = labels.ne(ignored)
    for row in range(labels.shape[0]):
        places = counted[row].nonzero().flatten().tolist() if labels.dim() == 2 else []
        spare = [place for place in places if place][:dropped]
        if len(places) > dropped + 1:
            labels[row, spare] = ignored
    labels[:rows, 0] = value
    return labels


def _keep_only(labels: Tensor, row: int, places: Any) -> Tensor:
    kept = torch.full_like(labels, IGNORED)
    value = labels[row][labels[row].ne(IGNORED)][0]
    for place in places:
        original = labels[row, place]
        kept[row, place] = torch.where(original.eq(IGNORED), value, original)
    return kept

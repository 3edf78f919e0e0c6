"""Values computed beside fake tensors are those of real ones; what is not known stays unknown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode

from brim.probes.tracker import StorageTracker
from brim.probes.values import KnownValues


@contextlib.contextmanager
def fake() -> Iterator[KnownValues]:
    known, tracker = KnownValues(), StorageTracker(kind=FakeTensor)
    tracker.read_scalar = known.read_scalar
    with FakeTensorMode(), known, tracker:
        yield known


def make_ids() -> torch.Tensor:
    ids = torch.full((2, 16), 5)
    ids[:, 3:7] = 9
    return ids


def test_masks_counts_and_places_are_those_of_real_tensors() -> None:
    def read() -> tuple[object, ...]:
        mask = make_ids() == 9
        lengths = mask.long().sum(-1)
        parts = torch.split(torch.zeros(2, 8), lengths.tolist(), dim=-1)
        return (
            mask.sum().item(), lengths.tolist(), mask.nonzero().tolist(), [tuple(one.shape) for one in parts],
            tuple(torch.zeros(2, 16, 3)[mask].shape), torch.where(mask)[1].tolist(),
            torch.repeat_interleave(torch.arange(2), lengths).tolist(), torch.unique(make_ids()).tolist(),
        )  # fmt: skip

    with fake():
        found = read()
    assert found == read()


def test_a_boolean_index_has_its_backward_pass() -> None:
    with fake():
        hidden = torch.zeros(2, 16, 4, requires_grad=True)
        picked = hidden[make_ids() == 9]
        torch.autograd.backward(picked.sum())
        assert picked.shape == (8, 4)
        assert hidden.grad is not None and hidden.grad.shape == hidden.shape


def test_writing_something_unknown_makes_a_value_unknown() -> None:
    weight = torch.empty(4, 4)
    with fake() as known:
        counts = torch.zeros(4)
        counts[:2] += 1
        assert counts.tolist() == [1, 1, 0, 0]
        view = counts[:2]
        unknown = torch.empty_strided(weight.shape, weight.stride())
        view += unknown[0, :2]
        assert known.find_value(counts) is None
        with pytest.raises(DynamicOutputShapeException):
            counts.nonzero()


def test_lists_are_written_together() -> None:
    with fake():
        steps = [torch.zeros(()), torch.zeros(())]
        torch._foreach_add_(steps, 1)
        assert [one.item() for one in steps] == [1, 1]


def test_a_random_draw_is_the_middle_of_its_range() -> None:
    """Layers are dropped where the draw is below a small probability: none is."""
    with fake():
        assert not torch.rand([]) < 0.1


def test_unknown_scores_elect_everyone_equally_often() -> None:
    with fake() as known:
        scores = torch.empty(32, 8)
        chosen = scores.topk(2, dim=-1)[1]
        assert torch.bincount(chosen.flatten()).tolist() == [8] * 8
        assert all(len(set(row)) == 2 for row in chosen.tolist())
        assert torch.bincount(scores.argmax(-1)).tolist() == [4] * 8
        assert scores.argmax(0, keepdim=True).shape == (1, 8)
    assert any("spread evenly" in note for note in known.describe())

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


def test_lists_of_scalars_become_tensors_that_are_known() -> None:
    with fake():
        lengths = (make_ids() == 9).sum(-1)
        made = torch.tensor([lengths[0], lengths.max() + 1])
        assert made.tolist() == [4, 5]
        assert torch.tensor([[1, 2], [3, 4]]).sum().item() == 10
    assert torch.tensor.__name__ == "tensor"  # switched off again


def test_a_tensor_of_one_number_is_known_when_it_is_asked_for() -> None:
    """Views made before a write see it, whoever made the tensor."""
    weight = torch.empty(4, 4)
    with fake() as known:
        unknown = torch.empty_strided(weight.shape, weight.stride())
        mask = torch.zeros_like(unknown)
        mask[:, 0] = 1
        assert mask.sum().item() == 4
        whole, state = torch.full_like(unknown, 3), torch.zeros_like(unknown)
        assert whole.tolist() == [[3] * 4] * 4
        state.lerp_(unknown, 0.1)
        assert known.find_value(state) is None


@pytest.mark.parametrize("lengths", [(4, 4), (7, 3)])
def test_ctc_keeps_what_the_real_loss_keeps(lengths: tuple[int, int]) -> None:
    def lose() -> tuple[tuple[int, ...], ...]:
        scores = torch.empty_strided((50, 2, 32), (64, 32, 1), requires_grad=True)
        labels, counts = torch.ones(sum(lengths), dtype=torch.long), torch.tensor(lengths)
        log_probs = scores.log_softmax(-1)
        loss, table = torch.ops.aten._ctc_loss(log_probs, labels, torch.full((2,), 50), counts)
        torch.autograd.backward(loss.sum())
        assert scores.grad is not None
        return tuple(loss.shape), tuple(table.shape), tuple(scores.grad.shape)

    with fake():
        found = lose()
    assert found == lose()

"""What is a storage and what is not: views, in-place operations, sums that autograd makes in place."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from brim.probes.tracker import StorageTracker


def list_bytes(tracker: StorageTracker) -> list[int]:
    return [event.num_bytes for event in tracker.events if event.num_bytes]


def test_a_storage_comes_and_goes_in_blocks_of_512() -> None:
    tracker = StorageTracker()
    with tracker:
        one = torch.ones(100)
        other = torch.ones(200, dtype=torch.bfloat16)
        del one
        del other
    assert list_bytes(tracker) == [512, 512, -512, -512]
    assert [storage.num_bytes for storage in tracker.storages.values()] == [400, 400]


def test_views_and_in_place_operations_cost_nothing() -> None:
    tracker = StorageTracker()
    with tracker:
        whole = torch.zeros(4, 256)
        part = whole[1:].view(-1).detach()
        whole.add_(1).mul_(2)
        del whole
        assert list_bytes(tracker) == [4096]
        del part
    assert list_bytes(tracker) == [4096, -4096]


def test_tensors_made_before_are_ignored_or_followed() -> None:
    weight, other = torch.zeros(256), torch.zeros(512)
    tracker = StorageTracker()
    tracker.follow([weight, weight[:3]], "parameter")
    with tracker:
        total = weight.sum() + other.sum()
        del total
    assert tracker.storages[0].category == "parameter"
    assert list_bytes(tracker)[0] == 1024
    assert sum(list_bytes(tracker)) == 1024


def test_storages_know_operator_module_and_phase() -> None:
    tracker = StorageTracker()
    tracker.begin("forward")
    tracker.modules.append("model.layers.0")
    with tracker:
        made = torch.zeros(8, 4) @ torch.zeros(4, 2)
    product = tracker.storages[2]
    assert (product.op, product.module, product.phase) == ("aten.mm.default", "model.layers.0", "forward")
    assert (product.dtype, product.shape) == ("float32", (8, 2))
    assert made.shape == (8, 2)


def test_labels_follow_what_is_alive() -> None:
    tracker = StorageTracker()
    with tracker:
        first = tracker.next_key
        kept, state = torch.zeros(10), torch.zeros(10)
        torch.zeros(10)
        tracker.label([state], "optimizer_state")
        tracker.label_live(first, "activation")
    assert [storage.category for storage in tracker.storages.values()] == ["activation", "optimizer_state", "temporary"]
    assert kept.numel() == 10


def test_what_lives_on_the_host_leaves_the_stream() -> None:
    tracker = StorageTracker()
    with tracker:
        step, other = torch.zeros(1), torch.zeros(1)
        tracker.move_to_host([step])
        del step
        del other
    assert list_bytes(tracker) == [512, -512]


def test_workspaces_pass_inside_an_operator() -> None:
    tracker = StorageTracker(lambda func, args, result: [1000] if func is torch.ops.aten.mm.default else [])
    with tracker:
        product = torch.zeros(8, 4) @ torch.zeros(4, 2)
    assert list_bytes(tracker)[-5:] != [] and 1024 in list_bytes(tracker) and -1024 in list_bytes(tracker)
    assert product is not None


def test_workspaces_of_an_operator_are_held_together() -> None:
    tracker = StorageTracker(lambda func, args, result: [1000, 2000] if func is torch.ops.aten.mm.default else [])
    with tracker:
        product = torch.zeros(8, 4) @ torch.zeros(4, 2)
    taken = list_bytes(tracker)
    first = taken.index(1024)
    assert taken[first : first + 4] == [1024, 2048, -2048, -1024] and product is not None


def test_fake_backward_sums_in_place_as_a_real_one() -> None:
    """A real engine adds the second gradient into the first; on fake tensors it makes a third tensor."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    tracker = StorageTracker(kind=FakeTensor)
    with FakeTensorMode():
        x = torch.zeros(1024, requires_grad=True)
        with tracker:
            hidden = x * 2
            loss = ((hidden * 3) * (hidden * 5)).sum()
            torch.autograd.backward(loss)
    live = highest = 0
    made = [storage.op for storage in tracker.storages.values()]
    for event in tracker.events:
        live += event.num_bytes
        highest = max(highest, live)
    sums = [key for key, storage in tracker.storages.items() if storage.key != key]
    assert len(sums) == 1, made
    assert highest <= 6 * 4096 + 1024


def _scale(hidden: torch.Tensor) -> list[torch.Tensor]:
    return [hidden * factor for factor in (3.0, 5.0, 7.0)]


def _view(hidden: torch.Tensor) -> list[torch.Tensor]:
    return [hidden.view(-1) * factor for factor in (3.0, 5.0, 7.0)]


def _branch(hidden: torch.Tensor) -> list[torch.Tensor]:
    return [hidden + hidden.exp() + hidden.sin()]


def _index(hidden: torch.Tensor) -> list[torch.Tensor]:
    return [hidden[[0]], hidden[[1, 2]], hidden[3:]]


@pytest.mark.parametrize("make_parts", [_scale, _view, _branch, _index])
def test_gradients_are_summed_where_the_real_engine_sums_them(make_parts) -> None:  # type: ignore[no-untyped-def]
    """In the place of the first, unless it is a view or something else holds it; fake tensors always make a new one."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    def run(tracker: StorageTracker) -> list[int]:
        hidden = torch.zeros(32, 32, requires_grad=True) * 2
        loss = sum(part.sum() for part in make_parts(hidden))
        first = len(tracker.events)
        torch.autograd.backward(loss)
        return [event.num_bytes for event in tracker.events[first:] if abs(event.num_bytes) >= 4096]

    real = StorageTracker()
    with real:
        expected = run(real)
    fake = StorageTracker(kind=FakeTensor)
    with FakeTensorMode(), fake:
        assert run(fake) == expected


def test_a_number_asked_of_a_fake_tensor_is_answered_and_noted() -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    tracker = StorageTracker(scalar=1.0)
    with FakeTensorMode():
        count = torch.zeros((), dtype=torch.long)
        with tracker:
            assert count.item() == 1
        with pytest.raises(DataDependentOutputException), StorageTracker():
            count.item()
    assert any("test_tracker.py" in place for place in tracker.scalars_asked)

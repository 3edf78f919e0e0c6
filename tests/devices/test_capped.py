from __future__ import annotations

import gc

import pytest

torch = pytest.importorskip("torch")

from brim.devices.capped import CappedMemory, find_capped  # noqa: E402
from brim.devices.meter import find_meter  # noqa: E402
from brim.spec.device import BLOCK_BYTES  # noqa: E402
from brim.units import MIB  # noqa: E402


def test_counts_what_lives_and_forgets_what_died() -> None:
    with CappedMemory(64 * MIB) as capped:
        kept = torch.zeros(1024, 1024)
        view = kept[:512].t()
        assert capped.allocated_bytes == 4 * MIB
        other = kept + 1
        assert capped.allocated_bytes == 8 * MIB
        del other
        gc.collect()
        assert capped.allocated_bytes == 4 * MIB
        del kept
        assert capped.allocated_bytes == 4 * MIB  # the view holds it
        del view
        assert capped.allocated_bytes == 0
        assert capped.peak_bytes == 8 * MIB
        capped.reset_peak()
        assert capped.peak_bytes == 0


def test_small_tensors_take_a_block() -> None:
    with CappedMemory(MIB) as capped:
        one = torch.ones(3)
        assert capped.allocated_bytes == BLOCK_BYTES
        del one


def test_refuses_what_goes_over_and_goes_on() -> None:
    with CappedMemory(6 * MIB) as capped:
        kept = torch.zeros(1024, 1024)
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory. Tried to allocate 4.0 MiB"):
            torch.zeros(1024, 1024)
        assert capped.num_ooms == 1
        assert capped.allocated_bytes == 4 * MIB
        small = kept[:256] + 1
        assert small.shape == (256, 1024)


def test_counts_tensors_made_before_when_they_are_used() -> None:
    before = torch.zeros(1024, 1024)
    with CappedMemory(6 * MIB) as capped:
        assert capped.allocated_bytes == 0
        before.mul_(2)
        assert capped.allocated_bytes == 4 * MIB
        with pytest.raises(torch.OutOfMemoryError):
            before + 1


def test_backward_and_optimizer_count_too() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(512, 512, bias=False)
    with CappedMemory(64 * MIB) as capped:
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            model(torch.ones(8, 512)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        weights_and_moments = 3 * 512 * 512 * 4
        assert weights_and_moments <= capped.allocated_bytes <= weights_and_moments + 16 * BLOCK_BYTES
        assert capped.peak_bytes >= 4 * 512 * 512 * 4  # and the gradient


def test_fails_where_it_is_told_to() -> None:
    with CappedMemory(64 * MIB, refuse=lambda number, num_bytes: number == 2) as capped:
        torch.zeros(4), torch.zeros(4)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(4)
        torch.zeros(4)
        assert capped.num_allocations == 4


def test_a_meter_reads_the_capped_cpu() -> None:
    assert find_capped() is None
    assert find_meter("cpu") is None
    with CappedMemory(8 * MIB) as capped:
        assert find_capped() is capped
        meter = find_meter("cpu")
        assert meter is not None and meter.capacity_bytes == 8 * MIB
        kept = torch.zeros(256, 1024)
        reading = meter.read()
        assert reading.allocated_bytes == reading.peak_reserved_bytes == MIB
        del kept
        meter.reset_peak()
        assert meter.read().peak_allocated_bytes == 0

"""Reading how much memory a device holds and held: one interface over CUDA's allocator and a capped CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from brim.devices.capped import CappedMemory, find_capped


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a device's counters say."""

    allocated_bytes: int
    """Bytes of live tensors."""
    peak_allocated_bytes: int
    """Most of them at once since the peak was reset."""
    reserved_bytes: int
    """Bytes the allocator holds, live or not."""
    peak_reserved_bytes: int
    """Most of them at once since the peak was reset."""
    device_bytes: int
    """Bytes in use on the device, by all programs."""
    num_retries: int
    """Times the allocator had to give its pool back to go on, since the process began."""
    num_ooms: int
    """Allocations refused, since the process began."""


class Meter(Protocol):
    """Counters of one device."""

    name: str
    """What its driver calls the device."""
    capacity_bytes: int
    """Memory it has, bytes."""

    def read(self) -> Reading:
        """Return the counters now."""

    def reset_peak(self) -> None:
        """Let peaks begin again from what is held now."""

    def release(self) -> None:
        """Give the pool of free blocks back to the device."""

    def wait(self) -> None:
        """Return once the device has done all that it was asked."""


class CudaMeter:
    """Counters of a CUDA (or ROCm) device: PyTorch's caching allocator and the driver."""

    def __init__(self, device: torch.device | int | None = None) -> None:
        """Read one device; the current one if None."""
        self._device = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)
        self.name = torch.cuda.get_device_name(self._device)
        self.capacity_bytes = torch.cuda.get_device_properties(self._device).total_memory

    def read(self) -> Reading:
        """Return the counters now."""
        stats = torch.cuda.memory_stats(self._device)
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        return Reading(
            allocated_bytes=stats.get("allocated_bytes.all.current", 0),
            peak_allocated_bytes=stats.get("allocated_bytes.all.peak", 0),
            reserved_bytes=stats.get("reserved_bytes.all.current", 0),
            peak_reserved_bytes=stats.get("reserved_bytes.all.peak", 0),
            device_bytes=total_bytes - free_bytes, num_retries=stats.get("num_alloc_retries", 0),
            num_ooms=stats.get("num_ooms", 0),
        )  # fmt: skip

    def reset_peak(self) -> None:
        """Let peaks begin again from what is held now."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def release(self) -> None:
        """Give the pool of free blocks back to the device."""
        torch.cuda.empty_cache()

    def wait(self) -> None:
        """Return once the device has done all that it was asked."""
        torch.cuda.synchronize(self._device)


class CappedMeter:
    """Counters of the capped CPU that this process runs on. It keeps no pool: reserved is what is allocated."""

    def __init__(self, capped: CappedMemory) -> None:
        """Read one capped CPU."""
        self._capped = capped
        self.name, self.capacity_bytes = "cpu", capped.capacity_bytes

    def read(self) -> Reading:
        """Return the counters now."""
        now, peak = self._capped.allocated_bytes, self._capped.peak_bytes
        return Reading(
            allocated_bytes=now, peak_allocated_bytes=peak, reserved_bytes=now, peak_reserved_bytes=peak,
            device_bytes=now, num_retries=0, num_ooms=self._capped.num_ooms,
        )  # fmt: skip

    def reset_peak(self) -> None:
        """Let peaks begin again from what is held now."""
        self._capped.reset_peak()

    def release(self) -> None:
        """Do nothing: there is no pool."""

    def wait(self) -> None:
        """Do nothing: a CPU is done when it returns."""


def find_meter(device: torch.device | str | None = None) -> Meter | None:
    """Return the counters of the device that a model lives on; None for a CPU without a cap, which counts nothing.

    Args:
        device: where the model lives; the current GPU, or the capped CPU, if None.
    """
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        return CudaMeter(None if device is None or torch.device(device).index is None else torch.device(device))
    capped = find_capped() if kind == "cpu" else None
    return CappedMeter(capped) if capped is not None else None

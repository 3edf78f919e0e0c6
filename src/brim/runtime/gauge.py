"""Peaks of memory in training, told apart from those of evaluation."""

from __future__ import annotations

from brim.devices.meter import Meter, Reading


class Gauge:
    """Reads a meter and keeps the peaks.

    The meter's peak is reset when a run begins, after its first step, in which `guard` measures, and after evaluation
    and saving: what they took is no part of a training step. So whoever else reads the peak sees it since the last of
    these, as with the Trainer's own `skip_memory_metrics=False`.
    """

    def __init__(self, meter: Meter | None) -> None:
        """Begin; None reads nothing."""
        self._meter = meter
        self.trained_bytes = self.allocated_bytes = self.reserved_bytes = self.device_bytes = 0
        self.last: Reading | None = None
        self._before = (0, 0)
        self.begin_again()

    @property
    def capacity_bytes(self) -> int | None:
        """Memory of the device; None without a meter."""
        return None if self._meter is None else self._meter.capacity_bytes

    @property
    def num_retries(self) -> int:
        """Times the allocator emptied its pool since the run began."""
        return 0 if self.last is None else self.last.num_retries - self._before[0]

    @property
    def num_ooms(self) -> int:
        """Allocations refused since the run began."""
        return 0 if self.last is None else self.last.num_ooms - self._before[1]

    def look(self) -> Reading | None:
        """Read after training steps."""
        reading = self._read()
        if reading is not None:
            self.trained_bytes = max(self.trained_bytes, reading.peak_allocated_bytes)
        return reading

    def look_aside(self) -> Reading | None:
        """Read after something that is no training step: its peak counts for the card, not for the steps."""
        reading = self._read()
        if self._meter is not None:
            self._meter.reset_peak()
        return reading

    def restart(self) -> None:
        """Forget the peaks so far."""
        if self._meter is not None:
            self._meter.reset_peak()
        self.trained_bytes = self.allocated_bytes = self.reserved_bytes = 0

    def begin_again(self) -> None:
        """Forget all that was counted so far: another way of running begins."""
        self.restart()
        self.last = None
        if self._meter is not None:
            reading = self._meter.read()
            self._before = (reading.num_retries, reading.num_ooms)

    def _read(self) -> Reading | None:
        if self._meter is None:
            return None
        self.last = reading = self._meter.read()
        self.allocated_bytes = max(self.allocated_bytes, reading.peak_allocated_bytes)
        self.reserved_bytes = max(self.reserved_bytes, reading.peak_reserved_bytes)
        # between looks the card held at least what the allocator did at its peak
        self.device_bytes = max(self.device_bytes, reading.device_bytes, reading.peak_reserved_bytes)
        return reading

"""What a simulated device answers: memory, seconds, and whether a strategy fits, in truth and as predicted."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("simulated.jsonl")
VARIANTS = ("none", "selective", "full")
CONTEXT_FRACTION = 0.02
_PAGED_SLOWER = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What running a strategy for a step or two shows."""

    fits: bool
    """Whether it ran within the card."""
    died: bool
    """Whether it ran out of memory."""
    peak_bytes: int
    """Most bytes allocated; 0 if it died."""
    reserved_bytes: int
    """Most bytes the pool held; 0 if it died."""
    num_retries: int
    """Times the allocator emptied its pool."""
    seconds: float
    """One optimizer step of the effective batch."""


@dataclass(frozen=True)
class SimulatedDevice:
    """One line of simulated.jsonl."""

    numbers: dict[str, Any]

    @property
    def usable_bytes(self) -> int:
        """Bytes that the process can get beside its context."""
        return int(self.numbers["capacity_bytes"] * (1 - CONTEXT_FRACTION))

    def splits(self) -> list[int]:
        """Return every micro-batch that divides the effective batch."""
        batch = self.numbers["effective_batch_size"]
        return [size for size in range(1, batch + 1) if batch % size == 0]

    def allocated(self, size: int, variant: str) -> int:
        """Return the true allocated peak of a step, bytes."""
        n = self.numbers
        kept = n["sequence_bytes"] * n["kept_fraction"][variant] * size
        if n["shape"] in ("steps", "all") and size >= n["step_at"]:
            kept += n["step_fraction"] * n["sequence_bytes"] * n["step_at"]
        return int(n["static_bytes"] + max(n["optimizer_bytes"], kept))

    def reserved(self, size: int, variant: str) -> int:
        """Return what the pool would like to hold, bytes: in steps beyond what is allocated."""
        n, bytes_ = self.numbers, self.allocated(size, variant)
        if n["shape"] not in ("fragmentation", "all"):
            return int(bytes_ * 1.01)
        return int(bytes_ * (1 + n["pool_fraction"] * min(1.0, math.floor(math.log2(size) + 1) / 4)))

    def seconds(self, size: int, variant: str) -> float:
        """Return the true time of one optimizer step while everything fits, seconds."""
        n = self.numbers
        per_sequence = n["sequence_seconds"] * (1 + n["knee_sequences"] / (size + n["knee_sequences"]))
        if n["rises_above"] and size > n["rises_above"]:
            per_sequence *= 1 + n["rise_fraction"]
        micro = n["launch_seconds"] + size * per_sequence
        return n["fixed_seconds"] + n["effective_batch_size"] // size * micro * n["slower"][variant]

    def run(self, size: int, variant: str) -> Answer:
        """Return what a trial of a strategy shows."""
        allocated, reserved = self.allocated(size, variant), self.reserved(size, variant)
        seconds, usable = self.seconds(size, variant), self.usable_bytes
        pages = self.numbers["shape"] in ("spill", "all")
        if allocated > usable * (1.5 if pages else 1.0):
            return Answer(fits=False, died=True, peak_bytes=0, reserved_bytes=0, num_retries=0, seconds=0.0)
        retries = 0 if reserved <= usable or pages else 3
        over = max(0.0, reserved / usable - 1)
        slow = 1.0 + (_PAGED_SLOWER * over if pages else 0.2 * (retries > 0))
        return Answer(
            fits=over == 0.0, died=False, peak_bytes=allocated, num_retries=retries,
            reserved_bytes=reserved if pages else min(reserved, usable), seconds=seconds * slow,
        )  # fmt: skip

    def predicted_bytes(self, size: int, variant: str) -> int:
        """Return the predicted allocated peak: what an affine law of two moments says, times an error."""
        n = self.numbers
        kept = n["sequence_bytes"] * n["kept_fraction"][variant] * size
        return int((n["static_bytes"] + max(n["optimizer_bytes"], kept)) * self._wrong("memory_factor", variant))

    def predicted_seconds(self, size: int, variant: str) -> float:
        """Return the predicted time of one optimizer step: launches and a plateau, times an error."""
        n = self.numbers
        micro = n["launch_seconds"] + (size + n["knee_sequences"]) * n["sequence_seconds"]
        true = n["fixed_seconds"] + n["effective_batch_size"] // size * micro * n["slower"][variant]
        return true * self._wrong("seconds_factor", variant)

    def _wrong(self, name: str, variant: str) -> float:
        n = self.numbers
        return math.exp(n["spread"] * (n[name] + n["variant_factor"][variant]))

    def runs_at_all(self) -> bool:
        """Return whether any strategy fits."""
        return any(self.run(size, variant).fits for size in self.splits() for variant in VARIANTS)

    def best(self) -> tuple[int, str, float]:
        """Return the fastest strategy that fits, and its seconds: every one is tried."""
        tried = [(self.run(size, variant), size, variant) for size in self.splits() for variant in VARIANTS]
        answer, size, variant = min((one for one in tried if one[0].fits), key=lambda one: one[0].seconds)
        return size, variant, answer.seconds


def read_devices() -> list[SimulatedDevice]:
    """Return the fifty devices."""
    lines = PATH.read_text(encoding="utf-8").splitlines()
    return [SimulatedDevice(json.loads(line)) for line in lines]

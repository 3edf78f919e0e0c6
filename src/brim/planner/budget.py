"""The bytes a plan may use.

A strategy fits when `peak_allocated_bytes <= budget_bytes`, where

    budget = 90 % x (plannable - outside) / (1 + margin)

- plannable: what one process can take now: free memory in this machine, else what the driver gives.
- outside: what the process spends besides torch's allocator (CUDA context, library handles). It is gone before
  the first tensor, so it comes off first.
- 90 %: the rest is left to the allocator. Reserved exceeds allocated by 4-5 % at the median, 9 % at the 90th
  percentile (43 B200 runs: 2.8-9.3 %; 63 published pairs: median 1.05), so allocated up to 90 % means reserved
  within the card. The peak compared is therefore the allocated one: counting fragmentation again would pay twice.
- margin: how far the answerer has been too low, as a fraction of its peak; `peak x (1 + margin)` must stay inside.
"""

from __future__ import annotations

from dataclasses import dataclass

from brim.spec.device import Device
from brim.units import format_size

USED_PERCENT = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be used, of what there is."""

    budget_bytes: int
    """Bytes the predicted allocated peak may reach."""
    capacity_bytes: int
    """Bytes there are (free ones, where the device is in this machine)."""
    sentence: str
    """How the one follows from the other."""


def find_budget(device: Device, *, outside_bytes: int, margin_fraction: float) -> Budget:
    """Return the budget on a device.

    Args:
        device: the device; its free memory counts where known.
        outside_bytes: what the process spends outside the allocator, bytes.
        margin_fraction: how far the answerer has been too low, share of its peak.
    """
    usable_bytes = max(0, device.plannable_bytes - outside_bytes)
    budget_bytes = int(usable_bytes * USED_PERCENT // 100 / (1 + margin_fraction))
    free = " free" if device.free_bytes is not None else ""
    margin = f", less {margin_fraction:.1%} for the error of the estimate" if margin_fraction else ""
    return Budget(
        budget_bytes=budget_bytes, capacity_bytes=device.plannable_bytes,
        sentence=(
            f"budget {format_size(budget_bytes)}: {USED_PERCENT} % of the {format_size(usable_bytes)} left of "
            f"{format_size(device.plannable_bytes)}{free} after the process's own context{margin}"
        ),
    )  # fmt: skip

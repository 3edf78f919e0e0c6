"""What measured runs say of the formula: factors with the error they had on runs they were not fitted to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from brim.spec.model import STRICT


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A factor on a predicted figure, and how wrong it was on runs that were held out of its fit."""

    __pydantic_config__ = STRICT

    factor: float
    """Median of measured over predicted."""
    num_runs: int
    """Runs it was fitted on."""
    num_different: int
    """Different ways of running among them; repetitions of one are held out together."""
    median_error_fraction: float
    """Held-out error, median of its size."""
    worst_error_fraction: float
    """Held-out error, largest size."""
    worst_shortfall_fraction: float
    """How far above the corrected figure a held-out run was at worst; 0 if none was."""

    @property
    def applied_factor(self) -> float:
        """The factor as far as it is safe: one below 1 is taken back by the worst held-out error, up to 1."""
        return self.factor if self.factor >= 1 else min(1.0, self.factor * (1 + self.worst_error_fraction))

    @property
    def margin_fraction(self) -> float:
        """What a held-out run needed beyond the applied factor at worst, share of the corrected figure."""
        return max(0.0, self.factor * (1 + self.worst_shortfall_fraction) / self.applied_factor - 1)

    def scale(self, size_bytes: int) -> int:
        """Return a predicted size corrected, bytes, rounded up."""
        return math.ceil(self.applied_factor * size_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Corrections of the formula for one card, torch release, trainer and family of models."""

    __pydantic_config__ = STRICT

    device: str
    """The card."""
    torch: str
    """Release of torch, major and minor."""
    trainer: str
    """Trainer preset."""
    model_type: str
    """Family of models."""
    allocated: Correction
    """Of the allocated peak."""
    slack: Correction | None = None
    """Of what the allocator holds beyond it; None if too few runs tell."""
    context: Correction | None = None
    """Of what is on the card beyond the allocator; None if too few runs tell."""
    seconds: Correction | None = None
    """Of the step time; None if too few runs tell."""

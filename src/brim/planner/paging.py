"""Paged optimizer states: counted by the driver as the process's, yet free to leave the card."""

from __future__ import annotations

from brim.cost.ledger import Estimate
from brim.cost.overhead import context_bytes
from brim.spec.workload import Workload
from brim.tables.read import find_optimizer


def paged_bytes(workload: Workload, estimate: Estimate) -> int:
    """Return the bytes of paged optimizer states in an estimate's device figure; 0 for other optimizers.

    They are managed memory outside the allocator: the driver moves them to the host when the card is full, so
    whether a plan fits does not depend on them.
    """
    if estimate.source != "formula" or not find_optimizer(workload.recipe.optimizer).paged:
        return 0
    outside, context = estimate.device_bytes - estimate.peak_reserved_bytes, context_bytes(workload.cluster.device)
    if estimate.calibration is not None and estimate.calibration.context is not None:
        context = estimate.calibration.context.scale(context)
    return max(0, outside - context)

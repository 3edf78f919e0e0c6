"""Seconds of the optimizer step itself: clipping, the update, and optimizer states that live in host memory."""

from __future__ import annotations

from brim.cost.collectives import host_bytes_per_second
from brim.cost.launches import SECONDS_PER_LAUNCH
from brim.cost.rates import Rates
from brim.cost.states import States, count_states, trained_bytes, trained_matrices
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.tables.read import Optimizer, find_optimizer

_CLIPPING_PASSES = 3
"""Norm (read) and scaling (read, write) of all gradients; transformers and TRL clip at 1.0 unless told otherwise."""
_UNFUSED = 20 / 7
"""Traffic of AdamW written out against the fused kernel: 20 tensor passes for 7. Source: torch/optim/adamw.py 2.13."""
_LAUNCHES_PER_TENSOR = {"loop": 12, "foreach": 0.2, "fused": 0.2}
"""Kernels per trained tensor. Source: torch/optim/adamw.py; multi-tensor kernels take chunks of tens of tensors."""
_PAGED_FRACTION = 0.4
"""Share of the host link that paged states reach when they do not fit: every page is fetched and evicted each step.

Source: te42kyfo/gpu-benches um-stream: 5.0 GB/s beyond the card's memory, where copies reach 12.35 GB/s. That is with
page faults; bitsandbytes prefetches, which may be up to 2.5 times faster.
"""
_NEWTON_SCHULZ_STEPS = 5


def update_seconds(workload: Workload, strategy: Strategy, rates: Rates) -> float:
    """Return the seconds from the last gradient to the next forward pass, all states on one device.

    Leaves out: optimizer states offloaded by the strategy.
    """
    recipe = workload.recipe
    optimizer, states = find_optimizer(recipe.optimizer), count_states(workload.model, recipe)
    moved = _CLIPPING_PASSES * states.gradients_bytes + _update_bytes(workload, strategy, optimizer, states)
    kind = "fused" if optimizer.min_quantised else strategy.optimizer_kernel
    tensors = sum(copies for *_, copies in trained_matrices(workload.model, recipe))
    on_device = moved / rates.bytes_per_second + _orthogonalise_seconds(workload, optimizer, rates)
    return max(on_device, tensors * _LAUNCHES_PER_TENSOR[kind] * SECONDS_PER_LAUNCH) + _paging_seconds(workload, states)


def _update_bytes(workload: Workload, strategy: Strategy, optimizer: Optimizer, states: States) -> float:
    """Read gradient, weight and states, write weight and states; more where the update is written out.

    Source: `passes` of tables/optimizers.toml, in the dtype the update computes in where it makes copies.
    """
    weights = states.trained_parameters * trained_bytes(workload.recipe)
    least = states.gradients_bytes + 2 * (weights + states.optimizer_bytes + states.paged_bytes)
    if optimizer.temporary_bytes is not None:
        return max(float(least), optimizer.passes * optimizer.temporary_bytes * states.trained_parameters)
    return least * (1.0 if strategy.optimizer_kernel == "fused" else _UNFUSED)


def _orthogonalise_seconds(workload: Workload, optimizer: Optimizer, rates: Rates) -> float:
    """Muon's Newton-Schulz iterations: per matrix of m <= n, 4 m^2 n + 2 m^3 operations each.

    Source: torch/optim/_muon.py 2.13 (five iterations of three products).
    """
    if optimizer.vector_state_of_parameter is None:
        return 0.0
    flops = 0.0
    for rows, columns, copies in trained_matrices(workload.model, workload.recipe):
        m, n = min(rows, columns), max(rows, columns)
        flops += copies * (4 * m * m * n + 2 * m**3)
    return _NEWTON_SCHULZ_STEPS * flops / rates.matmul_flops_per_second


def _paging_seconds(workload: Workload, states: States) -> float:
    """Paged states that do not fit beside weights and gradients cross the host link twice a step.

    Leaves out: pages that activations drive out during the micro-batches.
    """
    device = workload.cluster.device
    room = max(0, device.plannable_bytes - states.parameters_bytes - states.gradients_bytes)
    beyond = max(0, states.paged_bytes - room)
    return 2 * beyond / (_PAGED_FRACTION * host_bytes_per_second(device))

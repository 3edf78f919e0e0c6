"""Seconds of an optimizer step: `T = fixed + accumulation x micro-batch`, from rates, traffic and launches.

A micro-batch takes as long as the slower of two queues: the device's kernels one after another (products,
attention, traffic between them, expansion of quantised weights), or the host that starts them. The fixed part is the
optimizer, gradient clipping and what the all-reduce cannot hide.

Everything that does not depend on how the batch is split is worked out once and kept as a `Law`; a strategy then costs
a few multiplications, so that the search can ask for thousands.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from brim.cost.collectives import FIRST_BUCKET_BYTES, gather_seconds, host_bytes_per_second
from brim.cost.flops import sequence_tokens, text_groups
from brim.cost.ledger import StepTime
from brim.cost.products import count_passes
from brim.cost.rates import read_rates
from brim.cost.setting import residual_bytes
from brim.cost.states import count_states
from brim.cost.updates import update_seconds
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload


class Law(NamedTuple):
    """Coefficients of one choice of kernels; `b` is the micro-batch in sequences."""

    pass_seconds: tuple[tuple[float, float], ...]
    """For each pass over the weights: seconds per sequence, and the least it takes to read the weights."""
    sequence_seconds: float
    """Attention and traffic, per sequence."""
    overhead_seconds: float
    """What every micro-batch pays whatever its size: expanded weights, casts, partly filled waves, summed gradients."""
    launch_seconds: float
    """Time of the host to start all kernels of a micro-batch."""
    gathering_seconds: float
    """Collectives of a micro-batch, where parameters are sharded."""
    transfer_seconds: float
    """Layer inputs to host memory and back, per sequence, where activations are offloaded."""
    fixed_seconds: float
    """Optimizer and clipping, less the gradient sums the first micro-batch saves."""
    reduction_seconds: float
    """Gradient reduction of a step, before any of it is hidden."""
    visible_fraction: float
    """Share of the reduction that nothing can hide."""

    def micro_batch(self, b: int) -> float:
        """Return the seconds of one micro-batch."""
        products = sum(max(b * slope, least) for slope, least in self.pass_seconds)
        device = products + b * self.sequence_seconds + self.overhead_seconds
        return max(device, self.launch_seconds, self.gathering_seconds, b * self.transfer_seconds)

    def step(self, b: int, accumulation: int) -> tuple[float, float, float]:
        """Return fixed, micro-batch and step seconds. Half of a micro-batch is backward, and hides the reduction."""
        each = self.micro_batch(b)
        reduction = max(self.reduction_seconds - each / 2, self.reduction_seconds * self.visible_fraction)
        return self.fixed_seconds + reduction, each, self.fixed_seconds + reduction + accumulation * each


def step_time(workload: Workload, strategy: Strategy) -> StepTime | None:
    """Return how long an optimizer step takes on the workload's devices; None without rates for the device.

    Leaves out: loading data, logging, evaluation and saving; host-memory offload of states (a few GB/s: far slower);
    padding (sequences shorter than planned finish sooner); throttling under sustained load (up to 10 %).
    Neither tensor, pipeline nor context parallelism, nor several nodes, are timed: None.

    Raises:
        UnsupportedModel: the recipe has a part the formula does not know (DoRA).

    Source: the law and its parts: facts/scale.md section 3; each constant at its definition.
    """
    law = _law(workload, strategy)
    if law is None:
        return None
    fixed, each, step = law.step(strategy.micro_batch_size, strategy.gradient_accumulation_steps)
    tokens = strategy.micro_batch_size * strategy.gradient_accumulation_steps * sequence_tokens(workload)
    return StepTime(
        fixed_seconds=fixed, micro_batch_seconds=each, step_seconds=step, tokens_per_second_per_device=tokens / step
    )


def seconds(workload: Workload, strategy: Strategy) -> float | None:
    """Return the seconds of an optimizer step, as `step_time` does; what the search asks."""
    law = _law(workload, strategy)
    return None if law is None else law.step(strategy.micro_batch_size, strategy.gradient_accumulation_steps)[2]


@dataclass(frozen=True, slots=True, eq=False)
class _Same:
    """A workload by identity: hashing all of it at every question would take longer than the answer."""

    workload: Workload

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.workload is other.workload

    def __hash__(self) -> int:
        return id(self.workload)


@lru_cache(maxsize=64)
def _laws(same: _Same) -> dict[tuple[object, ...], Law | None]:
    """Return the laws found so far for a workload, by what decides them in a strategy."""
    return {}


def _law(workload: Workload, strategy: Strategy) -> Law | None:
    laws = _laws(_Same(workload))
    key = (
        strategy.activation_checkpointing, strategy.attention_kernel, strategy.loss_kernel, strategy.optimizer_kernel,
        strategy.layer_kernels, strategy.compile, strategy.activation_offload, strategy.zero_stage, strategy.offload,
        strategy.padding_free, strategy.mesh,
    )  # fmt: skip
    if key not in laws:
        laws[key] = _derive(workload, strategy)
    return laws[key]


def _derive(workload: Workload, strategy: Strategy) -> Law | None:
    """Return the law of a strategy's kernels; None for a device, a mesh or a link whose time is not known."""
    mesh, ranks = strategy.mesh, strategy.mesh.data_parallel_size
    rates = read_rates(workload.cluster.device, workload.recipe)
    if rates is None:
        return None
    states = count_states(workload.model, workload.recipe)
    sharded = states.parameters_bytes if strategy.zero_stage == 3 else 0
    gather = gather_seconds(sharded, ranks, workload.cluster) if sharded else 0.0
    scatter = gather_seconds(states.gradients_bytes, ranks, workload.cluster)
    if mesh.num_devices != ranks or strategy.offload != "none" or gather is None or scatter is None:
        return None
    passes = count_passes(workload, strategy, rates)
    share = 1 / ranks if strategy.zero_stage else 1.0
    return Law(
        pass_seconds=passes.pass_seconds, sequence_seconds=passes.sequence_seconds,
        overhead_seconds=passes.overhead_seconds, launch_seconds=passes.launch_seconds, gathering_seconds=2 * gather,
        transfer_seconds=_transfer_seconds(workload, strategy),
        fixed_seconds=max(0.0, share * update_seconds(workload, strategy, rates) - passes.sum_seconds),
        reduction_seconds=scatter if strategy.zero_stage == 3 else 2 * scatter,
        visible_fraction=min(1.0, FIRST_BUCKET_BYTES / max(1, states.gradients_bytes)),
    )  # fmt: skip


def _transfer_seconds(workload: Workload, strategy: Strategy) -> float:
    """Return the seconds one sequence's offloaded layer inputs take to host memory and back; they overlap with layers.

    Source: unsloth_zoo gradient_checkpointing.py: the input of every checkpointed layer, on a stream of its own.
    """
    if not strategy.activation_offload:
        return 0.0
    width = sum(group.count * group.hidden_size for group in text_groups(workload.model))
    moved = 2 * residual_bytes(workload.recipe) * width * sequence_tokens(workload)
    return moved / host_bytes_per_second(workload.cluster.device)

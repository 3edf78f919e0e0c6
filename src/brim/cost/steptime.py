"""Seconds of an optimizer step: `T = fixed + accumulation x micro-batch`, from rates, traffic and launches.

A micro-batch takes as long as the slower of two queues: the device's kernels one after another (products,
attention, traffic between them, expansion of quantised weights), or the host that starts them. The fixed part is the
optimizer, gradient clipping and what the all-reduce cannot hide.

Everything per workload and kernel choice is worked out once and kept in a `TimeLaw`; a strategy then costs a few
multiplications, so that the search can ask for thousands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from brim.cost.collectives import FIRST_BUCKET_BYTES, gather_seconds
from brim.cost.flops import sequence_tokens
from brim.cost.ledger import StepTime
from brim.cost.products import Passes, count_passes
from brim.cost.rates import Rates, read_rates
from brim.cost.states import count_states
from brim.cost.updates import update_seconds
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload


class Law(NamedTuple):
    """Coefficients of one choice of kernels, seconds; `b` is the micro-batch in sequences."""

    passes: tuple[tuple[float, float], ...]
    """For each pass over the weights: seconds per sequence, and the least it takes to read the weights."""
    per_sequence: float
    """Attention and traffic, per sequence."""
    per_micro_batch: float
    """What every micro-batch pays whatever its size: expanded weights, casts, partly filled waves, summed gradients."""
    host: float
    """Time of the host to start all kernels of a micro-batch."""
    gathers: float
    """Collectives of a micro-batch, where parameters are sharded."""
    fixed: float
    """Optimizer and clipping, less the gradient sums the first micro-batch saves."""
    reduction: float
    """Gradient reduction of a step, before any of it is hidden."""
    visible: float
    """Share of the reduction that nothing can hide."""

    def micro_batch(self, b: int) -> float:
        """Return the seconds of one micro-batch."""
        products = sum(max(b * slope, least) for slope, least in self.passes)
        device = products + b * self.per_sequence + self.per_micro_batch
        return max(device, self.host, self.gathers)

    def step(self, b: int, accumulation: int) -> tuple[float, float, float]:
        """Return fixed, micro-batch and step seconds. Half of a micro-batch is backward, and hides the reduction."""
        each = self.micro_batch(b)
        fixed = self.fixed + max(self.reduction - each / 2, self.reduction * self.visible)
        return fixed, each, fixed + accumulation * each


@dataclass(frozen=True, slots=True)
class TimeLaw:
    """The laws of one workload, made as they are asked for."""

    workload: Workload
    """The job."""
    rates: Rates
    """What its device reaches."""
    laws: dict[tuple[object, ...], Law | None]
    """Laws by what decides them in a strategy."""

    def find(self, strategy: Strategy) -> Law | None:
        """Return the law of a strategy's kernels; None for a mesh or a link whose time is not known."""
        key = (
            strategy.activation_checkpointing, strategy.attention_kernel, strategy.loss_kernel,
            strategy.optimizer_kernel, strategy.layer_kernels, strategy.compile, strategy.zero_stage, strategy.mesh,
        )  # fmt: skip
        if key not in self.laws:
            self.laws[key] = _derive(self.workload, strategy, self.rates)
        return self.laws[key]


def step_time(workload: Workload, strategy: Strategy) -> StepTime | None:
    """Return how long an optimizer step takes on the workload's devices; None without rates for the device.

    Leaves out: loading data, logging, evaluation and saving; host-memory offload of states (a few GB/s: far slower);
    padding (sequences shorter than planned finish sooner); throttling under sustained load (up to 10 %).
    Neither tensor, pipeline nor context parallelism, nor several nodes, are timed: None.

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


_latest: tuple[Workload, TimeLaw | None] | None = None


def _law(workload: Workload, strategy: Strategy) -> Law | None:
    """Return the law of a strategy; the last workload's are kept, because hashing a workload costs more than a law."""
    global _latest
    if _latest is None or _latest[0] is not workload:
        rates = read_rates(workload.cluster.device, workload.recipe)
        _latest = (workload, None if rates is None else TimeLaw(workload, rates, {}))
    laws = _latest[1]
    return None if laws is None else laws.find(strategy)


def _derive(workload: Workload, strategy: Strategy, rates: Rates) -> Law | None:
    mesh, ranks = strategy.mesh, strategy.mesh.data_parallel_size
    states = count_states(workload.model, workload.recipe)
    sharded = states.parameters_bytes if strategy.zero_stage == 3 else 0
    gather = gather_seconds(sharded, ranks, workload.cluster) if sharded else 0.0
    scatter = gather_seconds(states.gradients_bytes, ranks, workload.cluster)
    if mesh.num_devices != ranks or strategy.offload != "none" or gather is None or scatter is None:
        return None
    passes: Passes = count_passes(workload, strategy, rates)
    share = 1 / ranks if strategy.zero_stage else 1.0
    return Law(
        passes=passes.products, per_sequence=passes.per_sequence, per_micro_batch=passes.per_micro_batch,
        host=passes.host, gathers=2 * gather,
        fixed=max(0.0, share * update_seconds(workload, strategy, rates) - passes.gradient_sums),
        reduction=scatter if strategy.zero_stage == 3 else 2 * scatter,
        visible=min(1.0, FIRST_BUCKET_BYTES / max(1, states.gradients_bytes)),
    )  # fmt: skip

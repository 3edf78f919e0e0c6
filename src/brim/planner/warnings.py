"""What the user should know about a plan; never a reason to refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from brim.cost.ledger import Estimate
from brim.planner.batch import is_rounded
from brim.planner.experts import unquantised_expert_bytes
from brim.planner.paging import paged_bytes
from brim.planner.record import PlanWarning, Schedule
from brim.planner.rules import BF16_CAPABILITY, overflows_fp16
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.tables.exactness import LOOP_OF_TRAINER, find_exactness
from brim.tables.read import find_optimizer
from brim.units import format_size

NOT_EXACT = "accumulation_not_exact"
"""Code of the warning that a trainer does not train a class as the big batch would; exporters repeat it."""
FEW_STEPS = 100
"""Fewer optimizer steps than this leave no room for warmup and decay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What the warnings look at."""

    workload: Workload
    strategy: Strategy
    estimate: Estimate
    schedule: Schedule


def list_warnings(
    workload: Workload, strategy: Strategy, estimate: Estimate, schedule: Schedule
) -> tuple[PlanWarning, ...]:
    """Return every warning that applies, the gravest kind first."""
    facts = _Facts(workload=workload, strategy=strategy, estimate=estimate, schedule=schedule)
    return tuple(warning for find in _WARNINGS for warning in find(facts))


def _rule_of_thumb(facts: _Facts) -> Iterator[PlanWarning]:
    if facts.estimate.source != "rule":
        return
    text = "the rule of thumb leaves out optimizer states, gradients and logits; by formula counts them"
    devices = facts.workload.cluster.num_devices
    if devices > 1:
        text += f". It spreads the weights over {devices} devices, while every rank of this plan holds all of them"
    yield PlanWarning(code="rule_of_thumb", text=text)


def _batch_range(facts: _Facts) -> Iterator[PlanWarning]:
    batch, task = facts.workload.batch, facts.workload.task
    if batch.sequences < batch.min_useful:
        yield PlanWarning(
            code="batch_below_range",
            text=f"effective batch {batch.sequences} is below {batch.min_useful}, the least useful for {task}: "
            f"the gradient is mostly noise; {batch.low}-{batch.high} is the usual range",
        )
    elif batch.sequences > batch.max_useful:
        yield PlanWarning(
            code="batch_above_range",
            text=f"effective batch {batch.sequences} is above {batch.max_useful}, the most useful for {task}: "
            f"the same data gives fewer steps and learns less; {batch.low}-{batch.high} is the usual range",
        )
    elif not batch.low <= batch.sequences <= batch.high:
        yield PlanWarning(
            code="batch_outside_optimum",
            text=f"effective batch {batch.sequences} is outside {batch.low}-{batch.high}, the optimal range for {task}",
        )


def _rounded_tokens(facts: _Facts) -> Iterator[PlanWarning]:
    batch = facts.workload.batch
    if is_rounded(batch):
        yield PlanWarning(code="rounded_tokens", text=f"effective batch: {batch.reason}")


def _few_steps(facts: _Facts) -> Iterator[PlanWarning]:
    total, sequences, size = facts.schedule.total_steps, facts.schedule.num_sequences, facts.workload.batch.sequences
    if total is None or sequences is None:
        return
    if total < FEW_STEPS:
        yield PlanWarning(
            code="few_steps",
            text=f"only {total} optimizer steps: effective batch {size} is large for {sequences:,} sequences and "
            f"{facts.workload.num_epochs:g} epoch{'s' if facts.workload.num_epochs != 1 else ''}; "
            "a smaller effective batch gives more steps",
        )
    if sequences % size:
        yield PlanWarning(
            code="partial_window",
            text=f"the last step of each epoch averages over {sequences % size} sequences instead of {size}",
        )


def _positions(facts: _Facts) -> Iterator[PlanWarning]:
    longest, seq_len = facts.workload.model.max_position_embeddings, facts.workload.data.seq_len
    if longest is not None and seq_len > longest:
        yield PlanWarning(
            code="beyond_positions",
            text=f"sequences of {seq_len:,} tokens are longer than the {longest:,} positions "
            f"{facts.workload.model.name} was built for",
        )


def _optimizer_state(facts: _Facts) -> Iterator[PlanWarning]:
    states = max((moment.ledger.optimizer_states for moment in facts.estimate.moments), default=0)
    if facts.workload.recipe.method != "full" or not states:
        return
    yield PlanWarning(
        code="optimizer_state",
        text=f"{format_size(states)} of the {format_size(facts.estimate.peak_allocated_bytes)} peak are optimizer "
        f"states ({facts.workload.recipe.optimizer}); they appear after the first optimizer step",
    )


def _fragmentation(facts: _Facts) -> Iterator[PlanWarning]:
    plannable = facts.workload.cluster.device.plannable_bytes
    # Paged states leave the card by themselves, so they are no sign of fragmentation.
    process = facts.estimate.device_bytes - paged_bytes(facts.workload, facts.estimate)
    if process > plannable:
        yield PlanWarning(
            code="fragmentation",
            text=f"the allocator may hold {format_size(facts.estimate.peak_reserved_bytes)} and the process "
            f"{format_size(process)} of {format_size(plannable)}: set "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True against fragmentation",
        )


def _pure_bf16(facts: _Facts) -> Iterator[PlanWarning]:
    recipe = facts.workload.recipe
    if recipe.method == "full" and recipe.weight_dtype == "bf16" and not recipe.master_weights:
        yield PlanWarning(
            code="pure_bf16",
            text="weights and optimizer states are bf16 without fp32 master weights: small updates can round to "
            "nothing; keep the learning rate up, or load the model in fp32 (--dtype fp32)",
        )


def _experts_unquantised(facts: _Facts) -> Iterator[PlanWarning]:
    workload = facts.workload
    quantization = workload.recipe.quantization
    spared = unquantised_expert_bytes(workload)
    if spared and quantization is not None:
        yield PlanWarning(
            code="experts_unquantised",
            text=f"transformers 5 keeps all experts of a layer in one parameter, which bitsandbytes does not quantise: "
            f"{format_size(spared)} of {workload.model.name} are not in {quantization.kind}",
        )


def _accumulation(facts: _Facts) -> Iterator[PlanWarning]:
    """Warn where the trainer's own accumulation was measured not to be the big batch.

    Scripts that brim writes for Accelerate count for themselves.
    """
    trainer, architecture = facts.workload.recipe.engine.name, facts.workload.model.architecture
    if trainer == "accelerate" or facts.strategy.gradient_accumulation_steps == 1:
        return
    row = find_exactness(architecture, LOOP_OF_TRAINER.get(trainer, ""))
    if row is not None and not row.exact:
        routed = " with router losses on" if all(told.startswith("auxiliary") for told in row.told) else ""
        yield PlanWarning(
            code=NOT_EXACT,
            text=f"accumulating, {trainer} does not train {architecture}{routed} as the big batch would "
            f"(transformers {row.transformers}): {row.told[0]}; trainer = brim.guard(trainer) makes it exact, "
            "brim verify shows it",
        )


def _loss_scaling(facts: _Facts) -> Iterator[PlanWarning]:
    workload = facts.workload
    capability = workload.cluster.device.compute_capability
    if workload.recipe.compute_dtype != "fp16":
        return
    old = capability is not None and capability < BF16_CAPABILITY
    why = f"{workload.cluster.device.name} has no bf16" if old else "fp16 was asked for"
    yield PlanWarning(
        code="loss_scaling",
        text=f"{why}: gradients in fp16 underflow without loss scaling (on with fp16=True in the HF Trainer)",
    )


def _fp16_overflow(facts: _Facts) -> Iterator[PlanWarning]:
    workload = facts.workload
    if workload.recipe.compute_dtype == "fp16" and overflows_fp16(workload.model):
        yield PlanWarning(
            code="fp16_overflow",
            text=f"activations of {workload.model.model_type} models overflow in fp16 and give NaN losses: use "
            "--dtype fp32, or a card with bf16 (compute capability 8.0)",
        )


def _bitsandbytes_on_amd(facts: _Facts) -> Iterator[PlanWarning]:
    recipe, device = facts.workload.recipe, facts.workload.cluster.device
    optimizer = find_optimizer(recipe.optimizer)
    if device.vendor == "amd" and (recipe.quantization or optimizer.block_bytes or optimizer.paged):
        yield PlanWarning(
            code="bitsandbytes_on_amd",
            text=f"{device.name} needs the ROCm build of bitsandbytes for quantised weights and 8-bit or paged "
            "optimizers",
        )


def _padding(facts: _Facts) -> Iterator[PlanWarning]:
    data = facts.workload.data
    if data.packing or facts.workload.model.sequence_tokens is not None:
        return
    yield PlanWarning(
        code="padding",
        text=f"the lengths of the data are unknown: memory is sized for every sequence at {data.seq_len:,} tokens; "
        "shorter ones are padded to the longest of their micro-batch and cost time for nothing (packing avoids it)",
    )


def _packed_steps(facts: _Facts) -> Iterator[PlanWarning]:
    data = facts.workload.data
    if data.packing and data.num_sequences is not None:
        yield PlanWarning(
            code="packed_steps",
            text=f"packing joins the {data.num_sequences:,} sequences into fewer, longer ones; how many is known only "
            "after tokenising, so steps per epoch are not counted",
        )


_WARNINGS: tuple[Callable[[_Facts], Iterator[PlanWarning]], ...] = (
    _rule_of_thumb, _accumulation, _batch_range, _rounded_tokens, _few_steps, _positions, _fragmentation,
    _pure_bf16, _optimizer_state, _experts_unquantised, _loss_scaling, _fp16_overflow, _bitsandbytes_on_amd,
    _padding, _packed_steps,
)  # fmt: skip

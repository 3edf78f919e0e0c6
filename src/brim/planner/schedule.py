"""The run in optimizer steps, counted as the HF Trainer counts."""

from __future__ import annotations

from math import ceil

from brim.cost.ledger import StepTime
from brim.planner.record import Schedule
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.tables.read import find_task, find_trainer


def build_schedule(workload: Workload, strategy: Strategy, step_time: StepTime | None) -> Schedule:
    """Return steps per epoch and in total, warmup, and the time of an epoch, as far as known.

    The last accumulation window of an epoch is trained even when it is not full. With packing the number of
    filled sequences is unknown before the data is tokenised, so the counts stay unknown.

    Source: transformers 5.23 trainer.py set_initial_training_values (steps per epoch and in total are rounded
    up), training_args.py get_warmup_steps (rounded up).
    """
    sequences = None if workload.data.packing else workload.data.num_sequences
    step_sequences = workload.batch.sequences
    rank_sequences = strategy.micro_batch_size * strategy.mesh.data_parallel_size
    batches = None if sequences is None else ceil(sequences / rank_sequences)
    steps = None if batches is None else ceil(batches / strategy.gradient_accumulation_steps)
    total = None if steps is None else ceil(workload.num_epochs * steps)
    warmup = None if total is None else ceil(total * find_task(workload.task).warmup_fraction)
    return Schedule(
        num_sequences=sequences, steps_per_epoch=steps, total_steps=total, warmup_steps=warmup,
        sequences_per_step=step_sequences, tokens_per_step=workload.batch.tokens,
        epoch_seconds=_epoch_seconds(batches, steps, step_time),
        note=find_trainer(workload.recipe.engine.name).step_note,
    )  # fmt: skip


def _epoch_seconds(batches: int | None, steps: int | None, step_time: StepTime | None) -> float | None:
    if batches is None or steps is None or step_time is None:
        return None
    return batches * step_time.micro_batch_seconds + steps * step_time.fixed_seconds

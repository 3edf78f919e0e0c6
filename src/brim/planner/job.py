"""From checked options to a job: the workload, what stays fixed, and the defaults that were filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from brim.errors import InvalidInput
from brim.planner.batch import BatchRequest, choose_batch
from brim.planner.candidates import STRATEGY_FIELDS, Fixed
from brim.planner.options import JobOptions
from brim.planner.recipe import choose_recipe
from brim.planner.rules import is_causal
from brim.planner.target import constrain_knobs, trainer_for_target
from brim.spec.data import DataProfile
from brim.spec.device import Cluster
from brim.spec.model import ModelShape
from brim.spec.workload import Workload
from brim.tables.read import Trainer, find_optimizer, find_task, find_trainer

DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the planner is given."""

    workload: Workload
    """The job."""
    fixed: Fixed
    """Strategy fields the user fixed."""
    assumptions: tuple[str, ...]
    """Defaults that were filled in, one sentence each."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The model's `config.json`, for answerers that build the model; empty for a shape made by hand."""


def build_job(shape: ModelShape, cluster: Cluster, options: JobOptions) -> Job:
    """Return the job the options describe, on a model and devices already read.

    Raises:
        UnknownName: no such trainer, export target, task, optimizer or adapter target.
        Inexpressible: the export target has no word for the trainer, the optimizer or a fixed knob.
        IndivisibleBatch, InvalidInput: numbers that cannot be meant.
    """
    said: list[str] = []
    trainer = _choose_trainer(shape, options, said)
    task = find_task(options.task or "instruction-tuning")
    if options.task is None:
        said.append("task instruction-tuning")
    recipe = choose_recipe(shape, cluster.device, trainer, options)
    said += recipe.assumptions
    if options.dtype is None or options.seq_len is None:
        said.append(describe_trainer(trainer))
    seq_len = _choose_seq_len(shape, options, said)
    batch = choose_batch(_request(options), task, seq_len=seq_len, ranks=cluster.num_devices)
    if not _asks_batch(options):
        said.append(f"effective batch {batch.sequences} sequences: {batch.reason}")
    if options.epochs is None:
        said.append("1 epoch")
    data = DataProfile(
        name=options.dataset, num_sequences=options.dataset_size, seq_len=seq_len, packing=bool(options.packing)
    )
    workload = Workload(
        model=shape, data=data, recipe=recipe.recipe, batch=batch, cluster=cluster, task=task.name,
        num_epochs=float(options.epochs or 1), moe_imbalance=_read_imbalance(options),
    )  # fmt: skip
    fixed = _fixed(options)
    if recipe.optimizer_kernel is not None:
        fixed["optimizer_kernel"] = recipe.optimizer_kernel
    if options.target is not None:
        fixed = constrain_knobs(options.target, trainer, find_optimizer(recipe.recipe.optimizer), fixed)
    return Job(workload=workload, fixed=fixed, assumptions=tuple(said))


def _choose_trainer(shape: ModelShape, options: JobOptions, said: list[str]) -> Trainer:
    if options.trainer is not None:
        return find_trainer(options.trainer)
    if options.target is not None:
        trainer = find_trainer(trainer_for_target(options.target))
        said.append(f"trainer {trainer.name}, for the export to {options.target}")
        return trainer
    trainer = find_trainer("trl" if is_causal(shape) else "transformers")
    said.append(f"trainer {trainer.name}")
    return trainer


def describe_trainer(trainer: Trainer) -> str:
    """Return what the trainer does when nothing is said; the exporters say everything."""
    length = f", cuts at {trainer.default_seq_len:,} tokens" if trainer.default_seq_len else ""
    loads = "loads weights in fp32" if trainer.default_load_dtype == "fp32" else "loads weights as stored"
    checkpoints = f"{trainer.default_checkpointing} checkpointing".replace("none", "no")
    return f"left to itself {trainer.name} {loads}{length}, {checkpoints}; what is exported sets each explicitly"


def _choose_seq_len(shape: ModelShape, options: JobOptions, said: list[str]) -> int:
    if shape.sequence_tokens is not None:
        if options.seq_len not in (None, shape.sequence_tokens):
            raise InvalidInput(
                f"{shape.name} always reads {shape.sequence_tokens} tokens, not {options.seq_len}; leave seq_len out"
            )
        return shape.sequence_tokens
    if options.seq_len is not None:
        return options.seq_len
    seq_len = min(DEFAULT_SEQ_LEN, shape.max_position_embeddings or DEFAULT_SEQ_LEN)
    why = "" if seq_len == DEFAULT_SEQ_LEN else f", all the positions {shape.name} has"
    said.append(f"sequences of {seq_len:,} tokens{why}")
    return seq_len


def _read_imbalance(options: JobOptions) -> float:
    if options.moe_imbalance is not None and options.moe_imbalance < 1:
        raise InvalidInput(f"moe_imbalance is at least 1, an even share, not {options.moe_imbalance:g}")
    return float(options.moe_imbalance or 1)


def _request(options: JobOptions) -> BatchRequest:
    return BatchRequest(
        sequences=options.effective_batch_size, tokens=options.effective_batch_tokens,
        micro_batch_size=options.micro_batch_size, gradient_accumulation_steps=options.gradient_accumulation_steps,
    )  # fmt: skip


def _asks_batch(options: JobOptions) -> bool:
    both = options.micro_batch_size is not None and options.gradient_accumulation_steps is not None
    return both or options.effective_batch_size is not None


def _fixed(options: JobOptions) -> dict[str, Any]:
    values = {name: getattr(options, name, None) for name in sorted(STRATEGY_FIELDS)}
    return {name: value for name, value in values.items() if value is not None}

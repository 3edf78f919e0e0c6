"""The trainer of a plan, with the words that brim exports; and the user's own, turned to the strategy of the plan."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch

from brim.checks.script import load_factory
from brim.checks.subjects import make_tokenizer
from brim.devices.meter import Meter
from brim.errors import MissingExtra, ProbeFailed
from brim.exporters.trainer import name_training
from brim.exporters.trl import name_sft
from brim.exporters.words import ATTENTION, cpu_training, name_checkpointing
from brim.planner.record import Plan
from brim.probes.inputs import plan_inputs
from brim.tables.dialects import Dialect, find_dialect
from brim.trials.batches import fill_tokens, list_special
from brim.trials.drive import TrainerRun
from brim.trials.longest import find_longest, repeat_row
from brim.trials.model import adapt, cast_adapters, find_device, find_lora, load_model
from brim.trials.perform import FEW
from brim.trials.request import Request
from brim.versions import find_version

_BUILT = ("trl", "transformers")
"""Trainers that are also export targets of their names, whose words build them."""


def build_trainer(request: Request, meter: Meter) -> TrainerRun:
    """Return the plan's own trainer around a model with random weights.

    Raises:
        MissingExtra: the trainer is not installed. ProbeFailed: brim starts no such trainer by itself.
    """
    engine = request.plan.workload.recipe.engine.name
    if engine not in _BUILT:
        text = f"a trial starts no {engine} by itself; name your own trainer with --script train.py:make_trainer"
        raise ProbeFailed(text, engine=engine)
    dialect = find_installed(engine)
    build = _build_sft if engine == "trl" else _build_hf
    return build(request, dialect, meter)


def find_installed(target: str) -> Dialect:
    """Return the dialect of the installed release of a trainer."""
    package = find_dialect(target, None).package
    release = find_version(package)
    if release is None:
        raise MissingExtra(package=package, extra="train", purpose=f"a trial of {target}")
    return find_dialect(target, release)


def _build_hf(request: Request, dialect: Dialect, meter: Meter) -> TrainerRun:
    from transformers import Trainer, TrainingArguments

    plan, device = request.plan, find_device(request.on_cpu)
    words, notes = find_words(name_training(plan, dialect), dialect, request.on_cpu)
    arguments = TrainingArguments(tempfile.mkdtemp(), use_cpu=request.on_cpu, remove_unused_columns=False, **words)
    model = adapt(load_model(request, device), plan.workload.recipe)
    collator = _collate_random(plan, model)
    trainer = Trainer(model, arguments, train_dataset=range(1), data_collator=collator)
    length = plan.workload.model.sequence_tokens or plan.workload.data.seq_len
    return TrainerRun(trainer, meter, rows=range, longest_tokens=length, waiting=count_waiting(plan), notes=notes)


def _collate_random(plan: Plan, model: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
    """Return a collator that makes its rows up, whatever the model reads."""
    workload, strategy = plan.workload, plan.strategy
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    make = fill_tokens(plan_inputs(workload, strategy, base), workload.model.vocab_size, list_special(base.config))
    if not strategy.padding_free:
        return lambda rows: make()
    from transformers import DataCollatorWithFlattening

    flatten = DataCollatorWithFlattening()

    def collate(rows: list[Any]) -> Mapping[str, Any]:
        inputs = make()
        names = [name for name in ("input_ids", "labels") if name in inputs]
        return flatten([{name: inputs[name][row] for name in names} for row in range(strategy.micro_batch_size)])

    return collate


def _build_sft(request: Request, dialect: Dialect, meter: Meter) -> TrainerRun:
    from trl import SFTConfig, SFTTrainer

    plan, device = request.plan, find_device(request.on_cpu)
    words, notes = find_words(name_sft(plan, dialect), dialect, request.on_cpu)
    model, length = load_model(request, device), plan.workload.data.seq_len
    rows = _list_rows(plan, model.config)
    arguments = SFTConfig(
        tempfile.mkdtemp(), use_cpu=request.on_cpu, dataset_kwargs={"skip_prepare_dataset": True}, **words
    )
    trainer = SFTTrainer(
        model, arguments, train_dataset=rows(1), processing_class=make_tokenizer(),
        peft_config=find_lora(plan.workload.recipe),
    )  # fmt: skip
    _keep_attention(trainer, plan)
    cast_adapters(trainer.model, plan.workload.recipe)
    return TrainerRun(trainer, meter, rows=rows, longest_tokens=length, waiting=count_waiting(plan), notes=notes)


def _list_rows(plan: Plan, config: Any) -> Callable[[int], Any]:
    """Return a maker of datasets of token rows; what packing would have filled is one sequence."""
    from datasets import Dataset

    length, vocab_size = plan.workload.data.seq_len, plan.workload.model.vocab_size
    row = {"input_ids": torch.zeros(1, length, dtype=torch.long)}
    make = fill_tokens(lambda: row, vocab_size, list_special(config))

    def rows(count: int) -> Any:
        one: dict[str, Any] = {"input_ids": make()["input_ids"][0].tolist()}
        one |= {"seq_lengths": [length]} if plan.workload.data.packing else {}
        return repeat_row(Dataset.from_list([one]), 0, count)

    return rows


def _keep_attention(trainer: Any, plan: Plan) -> None:
    """Selective checkpointing of adapters, as exported scripts set it right."""
    if plan.strategy.activation_checkpointing == "selective" and plan.workload.recipe.lora is not None:
        from trl.models import enable_selective_activation_checkpointing

        enable_selective_activation_checkpointing(trainer.model.get_base_model())


def find_words(words: Mapping[str, Any], dialect: Dialect, on_cpu: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the exported keywords as they run here, and what was swapped because a CPU cannot do it."""
    swaps = cpu_training(words, dialect) if on_cpu else {}
    notes = tuple(f"on a CPU {name} is {value}, not {words.get(name)}" for name, value in swaps.items())
    unwanted = ("num_train_epochs", "save_strategy")
    return {name: value for name, value in {**words, **swaps}.items() if name not in unwanted}, notes


def count_waiting(plan: Plan) -> int:
    """Return the micro-batches of a step beyond those that are run, which the loop holds on the device all at once."""
    return max(0, plan.strategy.gradient_accumulation_steps - FEW)


def read_script(request: Request, meter: Meter) -> TrainerRun:
    """Return the user's own trainer, its micro-batch, checkpointing and attention those of the strategy.

    Raises:
        ProbeFailed: the function returns no trainer of transformers' kin.
    """
    from transformers import Trainer

    assert request.script is not None
    trainer, plan = load_factory(request.script)(), request.plan
    if not isinstance(trainer, Trainer):
        raise ProbeFailed(f"{request.script} returned {type(trainer).__name__}; a trial drives transformers.Trainer")
    turn(trainer, plan)
    dataset, index, length = find_longest(trainer.train_dataset)
    note = f"your own trainer on its longest row, {length:,} tokens; its callbacks, evaluation and saving are off"

    def rows(count: int) -> Any:
        return repeat_row(dataset, index, count)

    return TrainerRun(
        trainer, meter, rows=rows, longest_tokens=length, waiting=count_waiting(plan), notes=(note,)
    )  # fmt: skip


def turn(trainer: Any, plan: Plan) -> None:
    """Turn a trainer that was made for another strategy to that of the plan."""
    strategy, args = plan.strategy, trainer.args
    args.per_device_train_batch_size = trainer._train_batch_size = strategy.micro_batch_size
    model = trainer.accelerator.unwrap_model(trainer.model)
    kernel = ATTENTION[strategy.attention_kernel]
    if getattr(model.config, "_attn_implementation", kernel) != kernel:
        model.set_attn_implementation(kernel)
    words = name_checkpointing(plan, find_installed("transformers"))
    for name, value in copy.deepcopy(words).items():
        setattr(args, name, value)
    if strategy.activation_checkpointing == "none":
        if getattr(model, "is_gradient_checkpointing", False):
            model.gradient_checkpointing_disable()
    elif plan.workload.recipe.lora is not None:
        model.enable_input_require_grads()

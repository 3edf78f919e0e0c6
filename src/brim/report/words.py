"""A job and a strategy in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

from brim.planner.record import Plan
from brim.report.numbers import format_count
from brim.spec.recipe import Recipe
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

_ENGINE_NAMES = {"trl": "TRL", "transformers": "HF Trainer", "unsloth": "Unsloth", "accelerate": "Accelerate"}
_METHOD_NAMES = {"full": "full training", "lora": "LoRA", "qlora": "QLoRA"}
_KNOB_NOUNS = {"activation_checkpointing": "checkpointing"}
_SPLIT = {"micro_batch_size", "gradient_accumulation_steps", "mesh"}


def describe_recipe(recipe: Recipe) -> str:
    """Return method, storage and precision, for example `QLoRA (nf4, r 16)`."""
    details: list[str] = []
    if recipe.quantization is not None:
        details.append(recipe.quantization.kind)
    if recipe.lora is not None:
        details.append(f"r {recipe.lora.r}")
    if recipe.method == "full":
        details.append(f"{recipe.weight_dtype} weights" + (", fp32 master" if recipe.master_weights else ""))
    return f"{_METHOD_NAMES.get(recipe.method, recipe.method)} ({', '.join(details)})"


def describe_workload(workload: Workload) -> str:
    """Return the job in one line: model, method, optimizer, length, devices, trainer."""
    cluster, engine = workload.cluster, workload.recipe.engine.name
    count = f"{cluster.num_devices} x " if cluster.num_devices > 1 else ""
    nodes = f" on {cluster.num_nodes} nodes" if cluster.num_nodes > 1 else ""
    return (
        f"{workload.model.name}, {describe_recipe(workload.recipe)}, {workload.recipe.optimizer}, "
        f"{format_count(workload.data.seq_len)} tokens, {count}{cluster.device.name}{nodes}, "
        f"{_ENGINE_NAMES.get(engine, engine)}"
    )


def describe_batch(plan: Plan) -> str:
    """Return how the effective batch is made, for example `micro-batch 4 x accumulation 8 x 1 GPU = 32 sequences`."""
    strategy, ranks = plan.strategy, plan.strategy.mesh.data_parallel_size
    split = f"micro-batch {strategy.micro_batch_size} x accumulation {strategy.gradient_accumulation_steps}"
    devices = f"{ranks} GPU{'s' if ranks != 1 else ''}"
    return f"{split} x {devices} = {format_count(plan.effective_batch_size)} sequences per optimizer step"


def list_varied(strategies: Iterable[Strategy]) -> tuple[str, ...]:
    """Return the knobs that are not the same in all strategies, the split of the batch aside."""
    rows = list(strategies)
    names = (field.name for field in fields(Strategy) if field.name not in _SPLIT)
    return tuple(name for name in names if len({getattr(row, name) for row in rows}) > 1)


def describe_strategy(strategy: Strategy, knobs: Sequence[str]) -> str:
    """Return micro-batch x accumulation and the values of `knobs`, for example `4 x 8, selective checkpointing`."""
    words = [f"{strategy.micro_batch_size} x {strategy.gradient_accumulation_steps}"]
    return ", ".join(words + [_describe_knob(knob, getattr(strategy, knob)) for knob in knobs])


def describe_knobs(strategy: Strategy) -> str:
    """Return every knob that matters on one device, as one line."""
    knobs = ["activation_checkpointing", "attention_kernel", "loss_kernel", "optimizer_kernel"]
    unset = Strategy(micro_batch_size=1, gradient_accumulation_steps=1)
    others = (field.name for field in fields(Strategy) if field.name not in {*knobs, *_SPLIT})
    knobs += [name for name in others if getattr(strategy, name) != getattr(unset, name)]
    return ", ".join(_describe_knob(knob, getattr(strategy, knob)) for knob in knobs)


def _describe_knob(knob: str, value: object) -> str:
    noun = _KNOB_NOUNS.get(knob, knob.removesuffix("_kernel").replace("_", " "))
    if isinstance(value, bool):
        return noun if value else f"no {noun}"
    return f"no {noun}" if value == "none" else f"{noun} {value}" if isinstance(value, int) else f"{value} {noun}"

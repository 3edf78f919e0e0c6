"""What an export target asks of a plan: its trainer, and only words it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from brim.errors import Inexpressible
from brim.tables.dialects import Dialect, find_dialect, list_dialects
from brim.tables.read import Optimizer, Trainer

PAIRS = "training on pairs of answers"
PAIRS_ADVICE = "plan without an export, and put the plan's numbers into TRL's DPOConfig"
_TRAINERS = {"deepspeed": "transformers"}
_WORDS = {
    "activation_checkpointing": "{} activation checkpointing", "loss_kernel": "the {} loss",
    "layer_kernels": "{} layer kernels",
}  # fmt: skip


def trainer_for_target(target: str) -> str:
    """Return the trainer whose plans an export target can express; raises UnknownName."""
    name = find_dialect(target).target
    return _TRAINERS.get(name, name)


def constrain_knobs(target: str, trainer: Trainer, optimizer: Optimizer, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fixed knobs, narrowed to what the target can express; a tuple stands for one of its values.

    Args:
        target: name of the export target.
        trainer: the trainer planned for.
        optimizer: the recipe's optimizer.
        fixed: Strategy fields the user fixed.

    Raises:
        UnknownName: no such target.
        Inexpressible: the target has no word for a knob that is fixed, or for all the trainer has.
    """
    dialect = find_dialect(target)
    if trainer.prefers:
        raise Inexpressible(target=dialect.target, setting=PAIRS, advice=PAIRS_ADVICE)
    narrowed = dict(fixed)
    for name, considered, known in _choices(dialect, trainer, fixed):
        kept = tuple(value for value in considered if value in known)
        if not kept:
            setting = _WORDS[name].format(" or ".join(considered))
            raise Inexpressible(target=dialect.target, setting=setting, advice=_advice(name, trainer, dialect, known))
        if kept != considered:
            narrowed[name] = kept
    named = [kernel for kernel in optimizer.kernels if kernel in optimizer.hf]
    if not named:
        raise Inexpressible(
            target=dialect.target, setting=f"optimizer {optimizer.name}", advice="choose another, for example adamw"
        )
    if "optimizer_kernel" not in fixed and optimizer.kernels[0] != named[0]:
        narrowed["optimizer_kernel"] = named[0]
    return narrowed


def _choices(
    dialect: Dialect, trainer: Trainer, fixed: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Yield each knob with the values the planner would try and those the target has a word for."""
    own = next((row.checkpointing_kinds for row in list_dialects() if row.target == trainer.name), None)
    tried = {
        "activation_checkpointing": own or ("none", "selective", "full"), "loss_kernel": trainer.loss_kernels,
        "layer_kernels": trainer.layer_kernels,
    }  # fmt: skip
    known = {
        "activation_checkpointing": dialect.checkpointing_kinds, "loss_kernel": tuple(dialect.loss_kernels),
        "layer_kernels": dialect.layer_kernels,
    }  # fmt: skip
    for name, values in tried.items():
        yield name, (fixed[name],) if name in fixed else values, known[name]


def _advice(name: str, trainer: Trainer, dialect: Dialect, known: tuple[str, ...]) -> str:
    wanted = trainer_for_target(dialect.target)
    if name == "activation_checkpointing" or trainer.name == wanted:
        return f"use {' or '.join(known)}"
    return f"use --trainer {wanted} instead of {trainer.name}"

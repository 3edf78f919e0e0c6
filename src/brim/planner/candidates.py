"""Every strategy worth costing: exact splits x checkpointing x kernels, with what the user fixed left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from brim.errors import InvalidStrategy
from brim.planner.batch import exact_splits
from brim.planner.rules import broken_rule, default_attention
from brim.spec.strategy import Mesh, Strategy
from brim.spec.workload import Workload
from brim.tables.read import find_optimizer, find_trainer

Fixed = Mapping[str, Any]
"""Strategy fields that are fixed, with their values; a tuple leaves one of several open."""

_SPLIT = ("micro_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One choice of every knob but the split of the batch."""

    knobs: Mapping[str, Any]
    """Values by Strategy field."""

    def at(self, micro_batch_size: int, gradient_accumulation_steps: int) -> Strategy:
        """Return the strategy with that split."""
        return Strategy(
            micro_batch_size=micro_batch_size, gradient_accumulation_steps=gradient_accumulation_steps, **self.knobs
        )


def knobs_of(strategy: Strategy) -> Strategy:
    """Return the strategy with its split set to 1 x 1: equal for strategies that differ in the split only."""
    return replace(strategy, micro_batch_size=1, gradient_accumulation_steps=1)


def list_splits(workload: Workload, fixed: Fixed) -> tuple[tuple[int, int], ...]:
    """Return every (micro-batch, accumulation) that makes the effective batch, smallest micro-batch first.

    Raises:
        InvalidStrategy: what the user fixed leaves none.
    """
    ranks = _mesh(workload, fixed).data_parallel_size
    wanted = tuple(fixed.get(name) for name in _SPLIT)
    splits = tuple(
        split
        for split in exact_splits(workload.batch.sequences, ranks)
        if all(value is None or value == number for value, number in zip(wanted, split, strict=True))
    )
    if not splits:
        said = ", ".join(f"{name} {value}" for name, value in zip(_SPLIT, wanted, strict=True) if value is not None)
        raise InvalidStrategy(
            f"no split of {workload.batch.sequences} sequences over {ranks} ranks" + (f" with {said}" if said else "")
        )
    return splits


def list_variants(workload: Workload, fixed: Fixed) -> tuple[Variant, ...]:
    """Return every choice of the other knobs that no rule forbids, least recomputation first.

    Raises:
        InvalidStrategy: rules forbid them all; the text is the first rule's reason.
    """
    splits = list_splits(workload, fixed)
    variants, reasons = [], []
    for variant in _all_variants(workload, fixed):
        reason = broken_rule(workload, variant.at(*splits[0]))
        if reason is None:
            variants.append(variant)
        else:
            reasons.append(reason)
    if not variants:
        raise InvalidStrategy(_fixed_reason(reasons, fixed))
    return tuple(variants)


def _all_variants(workload: Workload, fixed: Fixed) -> Iterator[Variant]:
    narrowed = {name: value for name, value in fixed.items() if name not in _SPLIT}
    choices = _choices(workload) | {
        name: value if isinstance(value, tuple) else (value,) for name, value in narrowed.items()
    }
    for values in product(*choices.values()):
        yield Variant(knobs=dict(zip(choices, values, strict=True)))


def _choices(workload: Workload) -> dict[str, tuple[Any, ...]]:
    trainer = find_trainer(workload.recipe.engine.name)
    return {
        "activation_checkpointing": ("none", "selective", "full"),
        # flash needs a package that may be missing, eager only costs: both only when asked for.
        "attention_kernel": (default_attention(workload),),
        "loss_kernel": trainer.loss_kernels,
        "layer_kernels": trainer.layer_kernels,
        "optimizer_kernel": find_optimizer(workload.recipe.optimizer).kernels[:1],
        "activation_offload": (False, True) if trainer.activation_offload else (False,),
        "mesh": (_mesh(workload, {}),),
    }


def _mesh(workload: Workload, fixed: Fixed) -> Mesh:
    return fixed.get("mesh") or Mesh(dp_replicate=workload.cluster.num_devices)


def _fixed_reason(reasons: list[str], fixed: Fixed) -> str:
    """Return the reason that concerns what was fixed: the one every variant shares, else the first."""
    shared = [reason for reason in dict.fromkeys(reasons) if reasons.count(reason) == len(reasons)]
    return (shared or reasons)[0]


def check_strategy(workload: Workload, strategy: Strategy) -> Strategy:
    """Return the strategy.

    Raises:
        InvalidStrategy: it breaks a rule; the text is the rule's reason.
    """
    reason = broken_rule(workload, strategy)
    if reason is not None:
        raise InvalidStrategy(reason)
    return strategy


STRATEGY_FIELDS = frozenset(knob.name for knob in fields(Strategy))
"""Names a user may fix."""

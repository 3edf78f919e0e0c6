"""Which strategies of a job are worth running on this device: what its packages and its trainer can do."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from brim.planner.answerer import Answerer
from brim.planner.candidates import Fixed, list_splits, list_variants
from brim.planner.rules import broken_rule, default_attention
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.tables.dialects import list_dialects
from brim.tables.read import find_trainer
from brim.trials.ladder import Candidate


def list_candidates(workload: Workload, fixed: Fixed, answerer: Answerer, *, on_cpu: bool) -> tuple[Candidate, ...]:
    """Return micro-batch x checkpointing x attention kernel x loss kernel, with what each is predicted to cost.

    Args:
        workload: the job.
        fixed: Strategy fields that stay as they are.
        answerer: who predicts.
        on_cpu: whether it runs on a CPU, which has no package of GPU kernels.

    Raises:
        InvalidStrategy: rules forbid every one.
    """
    open_knobs = dict(fixed)
    for name, values in (
        ("attention_kernel", list_attention(workload, on_cpu)), ("loss_kernel", list_losses(workload, on_cpu)),
    ):  # fmt: skip
        open_knobs.setdefault(name, values)
    splits = list_splits(workload, fixed)
    strategies = (variant.at(*split) for variant in list_variants(workload, open_knobs) for split in splits)
    return tuple(_predict(workload, one, answerer) for one in strategies if broken_rule(workload, one) is None)


def _predict(workload: Workload, strategy: Strategy, answerer: Answerer) -> Candidate:
    seconds = answerer.seconds(workload, strategy)
    cost = answerer.order(workload, strategy) if seconds is None else seconds
    return Candidate(strategy=strategy, peak_bytes=answerer.peak(workload, strategy), seconds=cost)


def list_attention(workload: Workload, on_cpu: bool) -> tuple[str, ...]:
    """Return the attention kernels that run here; eager only where there is nothing better."""
    flash = ("flash",) if not on_cpu and _has("flash_attn") else ()
    return (default_attention(workload), *flash)


def list_losses(workload: Workload, on_cpu: bool) -> tuple[str, ...]:
    """Return the loss kernels that the trainer has here."""
    trainer = find_trainer(workload.recipe.engine.name)
    known: Iterable[str] = next(
        (dialect.loss_kernels for dialect in list_dialects() if dialect.target == trainer.name), ()
    )
    fused = not on_cpu and _has("liger_kernel")
    return tuple(dict.fromkeys((*trainer.loss_kernels, *(one for one in known if one != "fused" or fused))))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None

"""Proofs: that accumulation is exact, and that a plan's strategy changes no gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from brim.api.files import load_plan
from brim.api.jobs import read_shape
from brim.errors import InvalidInput
from brim.planner.record import Plan

if TYPE_CHECKING:
    from brim.checks.accumulation import Subject
    from brim.checks.report import AccumulationReport, NeutralityReport


def verify_accumulation(
    subject: str | Callable[[], Any], *, trainer: str | None = None, ranks: int = 1, sharding: str = "ddp",
    guarded: bool = False, full_size: bool = False,
) -> AccumulationReport:  # fmt: skip
    """Return the proof that micro-batches add up to the big batch's gradient, or the named cause where they do not.

    Args:
        subject: a model as for `plan`, a saved plan, `train.py:make_trainer`, or a function that returns a trainer.
        trainer: hf, sft, dpo, plain, accelerate or lightning; the plan's, or hf, if None.
        ranks: data-parallel ranks, started with torchrun on this machine's CPU.
        sharding: ddp or fsdp2, where there are several ranks; a trainer of your own says it in its arguments.
        guarded: verify the loop made exact by brim, not as installed.
        full_size: take a trainer's own model where it is, not a small copy on the CPU.

    Raises:
        InvalidInput: a sharding with a trainer of your own, or a function on several ranks.
        InseparableLoss: no split over micro-batches leaves the loss as it is.
        ProbeFailed: the model cannot be built small, or the ranks died.
    """
    from brim.checks.accumulation import verify_accumulation as prove
    from brim.checks.ranks import join_ranks, run_ranks
    from brim.checks.report import AccumulationReport
    from brim.checks.script import is_script
    from brim.checks.silence import silenced

    if sharding != "ddp" and (not isinstance(subject, str) or is_script(subject)):
        raise InvalidInput("--sharding goes with a model; a trainer of your own says fsdp=True in its arguments")
    if ranks == 1:
        join_ranks()
        with silenced():
            read = _read_subject(subject, trainer, sharding, guarded=guarded, full_size=full_size)
            return prove(replace(read, fix="") if guarded else read)  # a guard would be no news
    if not isinstance(subject, str):
        raise InvalidInput("several ranks run a script each: give train.py:make_trainer instead of a function")
    words = [subject, "--sharding", sharding, *(["--trainer", trainer] if trainer else [])]
    words += [flag for flag, said in (("--guarded", guarded), ("--full-size", full_size)) if said]
    return AccumulationReport.read(run_ranks(words, ranks))


def verify_neutrality(plan: Plan | str) -> NeutralityReport:
    """Return the proof that a plan's strategy leaves the gradient as it is, or which knob belongs to the workload.

    Args:
        plan: a plan, or the file it was saved to; a small copy of its model class is run on this machine's CPU.

    Raises:
        ProbeFailed: the model cannot be built small, or does not run plainly.
    """
    from brim.checks.accumulation import WINDOW
    from brim.checks.neutrality import verify_neutrality as prove
    from brim.checks.sequences import collate, make_rows
    from brim.checks.subjects import build_model

    loaded = load_plan(plan) if isinstance(plan, str) else plan
    shape, _, config = read_shape(loaded.workload.model.name, refresh=False, known_only=False)
    model = build_model(config, shape.architecture)
    rows = make_rows(type(model).__name__, model.config, WINDOW)
    return prove(model, rows, collate, loaded.strategy, recipe=loaded.workload.recipe)


def _read_subject(
    subject: str | Callable[[], Any], trainer: str | None, sharding: str, *, guarded: bool, full_size: bool
) -> Subject:
    """Return what is verified: the user's own trainer, or a small copy of a model under a loop by its name."""
    from brim.checks.ranks import count_ranks
    from brim.checks.script import is_plan, is_script, load_factory
    from brim.checks.subjects import build_subject
    from brim.checks.trainers import read_trainer
    from brim.runtime.forms import find_exact_form
    from brim.runtime.guard import guard
    from brim.tables.exactness import LOOP_OF_TRAINER

    if not isinstance(subject, str) or is_script(subject):
        make = load_factory(subject) if isinstance(subject, str) else subject
        return read_trainer(make, prepare=guard if guarded else None, num_ranks=count_ranks(), shrink=not full_size)
    loop = trainer
    if is_plan(subject):
        plan = load_plan(subject)
        subject, loop = plan.workload.model.name, trainer or LOOP_OF_TRAINER[plan.workload.recipe.engine.name]
    shape, _, config = read_shape(subject, refresh=False, known_only=False)
    exactly = find_exact_form(loop or "hf") if guarded else None
    return build_subject(
        config, shape.architecture, loop or "hf", exactly=exactly, num_ranks=count_ranks(), sharding=sharding
    )

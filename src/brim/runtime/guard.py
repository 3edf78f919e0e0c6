"""`guard`: one line that makes any Hugging Face trainer exact, watches it, and lets it survive an out-of-memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from brim.errors import InvalidInput
from brim.runtime.recover_trainer import RecoveringTrainer
from brim.runtime.trainer import ExactAccumulation

if TYPE_CHECKING:
    from brim.planner.record import Plan
    from brim.spec.observation import Observation

Trainer = TypeVar("Trainer")
_OLDEST = (4, 46)

_GUARDED: dict[tuple[type, type], type] = {}
"""Guarded class of each mixin and trainer class, so that two guarded trainers of a class are of one class too."""


def guard(
    trainer: Trainer, plan: Plan | None = None, *, exact: bool = True, watch: bool = True,
    recover: bool | None = None, note: Callable[[Observation], None] | None = None,
) -> Trainer:  # fmt: skip
    """Return the same trainer, its class rebound to a guarded subclass of itself.

    `brim.guard` is this with the history as `note`, and says what each argument means.

    Args:
        trainer, plan, exact, watch, recover: as `brim.guard` takes them.
        note: given the observation when a watched run with a plan is over.

    Raises:
        InvalidInput: no trainer, something guard cannot do, transformers older than 4.46, DataParallel.
    """
    _check(trainer)
    if recover and not exact:
        raise InvalidInput("recover cuts micro-batches, which only exact accumulation makes the same step: exact=True")
    if exact and (recover or not isinstance(trainer, ExactAccumulation)):
        _rebind(trainer, RecoveringTrainer if recover is not False else ExactAccumulation)
        trainer._recover_plan = plan
        trainer._recover_asked = bool(recover)
    from brim.runtime.callback import forget_watch, watch_trainer

    if watch:
        watch_trainer(trainer, plan, note)
    else:
        forget_watch(trainer)
    return trainer


def unguard(trainer: Trainer) -> Trainer:
    """Return the trainer with its own class again, watched no longer."""
    from brim.runtime.callback import forget_watch

    forget_watch(trainer)
    if type(trainer) in _GUARDED.values():
        trainer.forget_window()  # type: ignore[attr-defined]
        trainer.__class__ = type(trainer).__bases__[-1]
    return trainer


def _rebind(trainer: Any, mixin: type) -> None:
    """Give a trainer the guarded subclass of its class; it has its name, since logs and model cards show it."""
    if isinstance(trainer, mixin):
        return
    kind = type(unguard(trainer))
    if (mixin, kind) not in _GUARDED:
        doc = f"{kind.__name__} with exact accumulation."
        _GUARDED[mixin, kind] = type(kind.__name__, (mixin, kind), {"__doc__": doc, "__module__": kind.__module__})
    trainer.__class__ = _GUARDED[mixin, kind]


def _check(trainer: Any) -> None:
    try:
        import transformers
    except ModuleNotFoundError:
        raise InvalidInput("guard takes a transformers.Trainer; for a plain loop use brim.accumulate") from None
    if not isinstance(trainer, transformers.Trainer):
        name = type(trainer).__name__
        raise InvalidInput(f"guard takes a transformers.Trainer, not {name}; for a plain loop use brim.accumulate")
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _OLDEST:
        raise InvalidInput(
            f"transformers {transformers.__version__} averages micro-batch means and offers no place to count before "
            "training; guard needs 4.46 or later, or use brim.accumulate in a plain loop"
        )
    if trainer.args.n_gpu > 1:
        raise InvalidInput(
            f"DataParallel over {trainer.args.n_gpu} GPUs in one process cannot be made exact; "
            f"start with torchrun --nproc-per-node {trainer.args.n_gpu}, or set CUDA_VISIBLE_DEVICES to one GPU"
        )

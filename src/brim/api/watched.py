"""Training that is watched, each run noted in the history when it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from brim.api.measured import add_observation

if TYPE_CHECKING:
    from brim.planner.record import Plan
    from brim.runtime.watched_loop import WatchedLoop
    from brim.spec.observation import Observation

Trainer = TypeVar("Trainer")
Note = Callable[["Observation"], Any]


def guard(
    trainer: Trainer, plan: Plan | None = None, *, exact: bool = True, watch: bool = True,
    recover: bool | None = None, history: bool | None = None, note: Note | None = None,
) -> Trainer:  # fmt: skip
    """Return the same trainer, made exact, and watched: its class is rebound to a subclass of itself.

        trainer = brim.guard(SFTTrainer(...), plan)
        trainer.train()

    Guarding twice changes nothing; `unguard` gives the class back. What the loss averages over is measured on the first
    batch. The logged loss is the true mean over the batch, that of evaluation the true mean over the evaluation set.

    Args:
        trainer: a `transformers.Trainer` or any subclass: Seq2SeqTrainer, TRL's SFT, DPO, Reward, your own.
        plan: the plan that the run follows, or None.
        exact: whether accumulation is made exact.
        watch: whether memory and speed are watched and compared with the plan: what is wrong is said in one line on
            stderr, each log of training gets `memory/...` and `speed/...`, and `brim-run.json` is written into the
            output folder.
        recover: whether an out-of-memory is survived, in training and evaluation: the window is run again in smaller
            micro-batches. If None it is where accumulation is made exact, and where that can be done at all (a warning
            says why not); True insists.
        history: whether a watched run with a plan is noted in the history; it is unless this is false or
            BRIM_HISTORY=off.
        note: given the observation too, when the run is over.

    Raises:
        CannotRecover: raised by `train()` when memory runs out and no smaller split is left.
        InvalidInput: no trainer, something guard cannot do, transformers older than 4.46, DataParallel.
        Unrecoverable: raised by `train()` when recovery was asked for and cannot be had: DeepSpeed, an older FSDP2.
        InseparableLoss: raised by `train()` when the loss is no mean that splits over micro-batches.
    """
    from brim.runtime.guard import guard as guard_trainer

    return guard_trainer(trainer, plan, exact=exact, watch=watch, recover=recover, note=_keep(history, note))


def watch(
    plan: Plan | None = None, *, device: Any = None, folder: str | None = None, history: bool | None = None,
    note: Note | None = None, group: Any = None, longest_tokens: int | None = None, num_steps: int | None = None,
    recovery: Any = None, tell: Callable[[str], None] | None = None,
) -> WatchedLoop:  # fmt: skip
    """Return a context that watches a plain loop: memory and speed beside the plan, one line for what is wrong.

        with brim.watch(plan) as w:
            for batch in w.steps(loader):
                for micro in brim.accumulate(batch, plan.strategy.micro_batch_size, model=model):
                    micro.backward(model(**micro.inputs).loss)
                optimizer.step()
                optimizer.zero_grad()
        w.observation

    `steps` hands on what a loader yields, and takes each for one optimizer step; where the loader yields micro-batches,
    `w.steps(loader, per_step=8)` counts eight to a step. Where neither is so, `w.step()` once after each optimizer step
    does: `inputs` (one batch or a list of them) lets tokens be counted, `loss` lets the first one be looked at. What
    else the loop does between steps, such as evaluation, goes into `with w.aside():`. `w.read_log()` returns
    `memory/...` and `speed/...` for a logger. What is run is taken to be split as the plan says.

    Ranks tell each other their numbers in a few steps, right after an optimizer step: all must make as many.

    Args:
        plan: the plan that the loop follows; None compares with nothing.
        device: where the model lives; the current GPU, or the capped CPU, if None.
        folder: where `brim-run.json` goes; None writes none.
        history: whether a run with a plan is noted in the history; it is unless this is false or BRIM_HISTORY=off.
        note: given the observation too, at the end.
        group: process group of the data-parallel ranks; the default one if None.
        longest_tokens: longest sequence of the data; the planned length if None.
        num_steps: optimizer steps of the loop, so that the last one is looked at too.
        recovery: what runs the steps if an out-of-memory is survived, and so may change the micro-batch on the way.
        tell: given each line; prints to stderr if None.
    """
    from brim.runtime.watched_loop import watch as watch_loop

    return watch_loop(
        plan, device=device, folder=folder, note=_keep(history, note), group=group, longest_tokens=longest_tokens,
        num_steps=num_steps, recovery=recovery, tell=tell,
    )  # fmt: skip


def _keep(history: bool | None, note: Note | None) -> Note | None:
    """Return what notes a run in the history and hands it on; None where nobody wants it."""
    if history is False:
        return note

    def keep(observation: Observation) -> str | None:
        problem = add_observation(observation)
        if note is not None:
            note(observation)
        return problem

    return keep

"""Watching a Hugging Face trainer: a callback for its events, and two of its methods seen from outside."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from transformers import TrainerCallback

from brim.devices.meter import find_meter
from brim.losses.tap import LossTap
from brim.planner.record import Plan
from brim.runtime.judge import judge_loss, judge_split
from brim.runtime.lengths import find_longest
from brim.runtime.observe import Note, Task, Watcher, say
from brim.runtime.run_record import name_problem
from brim.runtime.survival import read_survival
from brim.runtime.trainer import ExactAccumulation
from brim.spec.strategy import Strategy

_WRAPPED = ("training_step", "log")


class WatchCallback(TrainerCallback):
    """Tells a `Watcher` when a trainer steps, evaluates, saves and ends; every call of `train` is a run of its own."""

    def __init__(self, trainer: Any, plan: Plan | None, note: Note | None, tell: Callable[[str], None] = say) -> None:
        self.trainer, self.plan, self.note, self.tell = trainer, plan, note, tell
        self.watcher: Watcher | None = None
        self.tap: _FirstWindow | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin a run."""
        task = _read_task(self.trainer, self.plan, state)
        meter = find_meter(args.device)
        self.watcher = watcher = Watcher(task, meter, note=self.note, tell=self.tell)
        watcher.find(_check_split(self.trainer, self.plan, task.strategy))
        sums = not isinstance(self.trainer, ExactAccumulation) and not args.torch_compile
        steps = task.strategy.gradient_accumulation_steps
        self.tap = _FirstWindow(steps) if sums and steps > 1 and task.is_first else None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let time run."""
        if self.watcher is not None:
            self.watcher.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count an optimizer step; the first one tells how its loss was added up."""
        if self.watcher is None:
            return
        self.watcher.end_step(looks=control.should_evaluate or control.should_save)
        if self.tap is not None:
            self.watcher.find(self.tap.judge(self.watcher.step))
            self.tap = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep evaluation out of the steps."""
        self._set_aside()

    on_save = on_predict = on_evaluate

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the start of the data's workers out of the steps."""
        if self.watcher is not None:
            self.watcher.pause()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the peaks before the evaluation of an epoch hides them."""
        if self.watcher is not None:
            self.watcher.look()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the run."""
        self.finish()

    def finish(self, problem: str = "") -> None:
        """End the run, if there is one."""
        watcher, self.watcher, self.tap = self.watcher, None, None
        if watcher is not None:
            watcher.finish(problem)

    def _set_aside(self) -> None:
        if self.watcher is not None:
            self.watcher.set_aside()

    def training_step(self, theirs: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one micro-batch as the trainer does; note its tokens, and why it died if it does."""
        if self.watcher is None:
            return theirs(model, inputs, *args, **kwargs)
        self.watcher.add(inputs)
        try:
            if self.tap is None:
                return theirs(model, inputs, *args, **kwargs)
            return self.tap.run(theirs, model, inputs, *args, **kwargs)
        except BaseException as error:
            self.finish(name_problem(type(error)))
            raise

    def log(self, theirs: Callable[..., Any], logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Add memory and speed to what the trainer logs of training, so that all its loggers have them."""
        if self.watcher is not None and "loss" in logs:
            logs.update(self.watcher.read_log())
        return theirs(logs, *args, **kwargs)


class _FirstWindow:
    """What the loss functions of the first window averaged over, beside what the loop made of it."""

    def __init__(self, num_micro_batches: int) -> None:
        self._most = num_micro_batches
        self._losses: list[Any] = []
        self._total = self._terms = 0.0

    def run(self, theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a micro-batch and look on."""
        with LossTap() as tap:
            loss = theirs(*args, **kwargs)
        self._losses.append(loss)
        self._total += sum(call.value * call.num_terms for call in tap.calls)
        self._terms += sum(call.num_terms for call in tap.calls)
        return loss

    def judge(self, step: int) -> Any:
        """Return a verdict where the loop has added up what it should have averaged."""
        if not self._terms or len(self._losses) < 2:
            return None
        loss = math.fsum(float(one) for one in self._losses)
        return judge_loss(step, loss, self._total / self._terms, len(self._losses))


def watch_trainer(trainer: Any, plan: Plan | None, note: Note | None = None) -> None:
    """Have a trainer watched; one that is watched already goes on with the new plan."""
    callback = find_watch(trainer)
    if callback is not None:
        callback.plan, callback.note = plan, note
        return
    callback = WatchCallback(trainer, plan, note)
    trainer.add_callback(callback)
    for name in _WRAPPED:
        setattr(trainer, name, _see(trainer, name, getattr(callback, name)))


def forget_watch(trainer: Any) -> None:
    """Take back what `watch_trainer` has put on a trainer."""
    callback = find_watch(trainer)
    if callback is None:
        return
    trainer.callback_handler.callbacks.remove(callback)
    for name in _WRAPPED:
        vars(trainer).pop(name, None)


def find_watch(trainer: Any) -> WatchCallback | None:
    """Return the callback of a watched trainer; None if it is not watched."""
    return next((one for one in trainer.callback_handler.callbacks if isinstance(one, WatchCallback)), None)


def _see(trainer: Any, name: str, see: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method seen from outside; the class is asked at each call, since guards may be put on later."""

    @wraps(getattr(type(trainer), name))
    def method(*args: Any, **kwargs: Any) -> Any:
        return see(getattr(type(trainer), name).__get__(trainer), *args, **kwargs)

    return method


def _read_task(trainer: Any, plan: Plan | None, state: Any) -> Task:
    args = trainer.args
    longest, most = find_longest(trainer.train_dataset), getattr(args, "max_length", None)
    coming = min(longest, most) if longest is not None and isinstance(most, int) else longest
    last = state.max_steps - state.global_step
    return Task(
        plan=plan, strategy=_read_strategy(trainer, plan), coming_tokens=coming, last_step=last if last > 0 else None,
        folder=args.output_dir, is_first=state.is_world_process_zero, device=args.device,
        survival=lambda: read_survival(getattr(trainer, "recovery", None)),
    )  # fmt: skip


def _read_strategy(trainer: Any, plan: Plan | None) -> Strategy:
    """Return the plan's strategy with the split that the trainer runs."""
    args = trainer.args
    size = getattr(trainer, "_train_batch_size", None) or args.per_device_train_batch_size
    steps = args.gradient_accumulation_steps
    if plan is None:
        return Strategy(micro_batch_size=size, gradient_accumulation_steps=steps)
    return replace(plan.strategy, micro_batch_size=size, gradient_accumulation_steps=steps)


def _check_split(trainer: Any, plan: Plan | None, strategy: Strategy) -> Any:
    """Return a verdict where the trainer splits the batch in another way than the plan; only data parallelism can."""
    if plan is None or plan.strategy.mesh.num_devices != plan.strategy.mesh.data_parallel_size:
        return None
    planned = plan.strategy
    ran = (strategy.micro_batch_size, strategy.gradient_accumulation_steps, trainer.args.world_size)
    said = (planned.micro_batch_size, planned.gradient_accumulation_steps, planned.mesh.data_parallel_size)
    return judge_split(0, ran=ran, planned=said, effective=plan.effective_batch_size)

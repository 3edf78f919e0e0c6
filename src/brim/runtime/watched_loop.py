"""Watching a plain PyTorch loop: `with brim.watch(plan) as w`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from brim.devices.meter import find_meter
from brim.planner.record import Plan
from brim.runtime.judge import judge_first_loss
from brim.runtime.observe import Note, Task, Watcher, say
from brim.runtime.ranks import is_distributed
from brim.spec.observation import Observation
from brim.spec.strategy import Strategy

Item = TypeVar("Item")


def watch(
    plan: Plan | None = None, *, device: Any = None, folder: str | None = None, note: Note | None = None,
    group: Any = None, longest_tokens: int | None = None, num_steps: int | None = None,
    tell: Callable[[str], None] = say,
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
    else the loop does between steps, such as evaluation, goes into `with w.aside():`. What is run is taken to be split
    as the plan says.

    Ranks tell each other their numbers in a few steps, right after an optimizer step: all must make as many.

    Args:
        plan: the plan that the loop follows; None compares with nothing.
        device: where the model lives; the current GPU, or the capped CPU, if None.
        folder: where `brim-run.json` goes; None writes none.
        note: given the observation at the end.
        group: process group of the data-parallel ranks; the default one if None.
        longest_tokens: longest sequence of the data; the planned length if None.
        num_steps: optimizer steps of the loop, so that the last one is looked at too.
        tell: given each line; prints to stderr.
    """
    strategy = plan.strategy if plan is not None else Strategy(micro_batch_size=1, gradient_accumulation_steps=1)
    task = Task(
        plan=plan, strategy=strategy, coming_tokens=longest_tokens, last_step=num_steps, folder=folder,
        is_first=_is_first(), device=_find_collective_device(device), group=group,
    )  # fmt: skip
    return WatchedLoop(task, device, note, tell)


class WatchedLoop:
    """A plain loop that is watched; `brim.watch` makes one."""

    def __init__(self, task: Task, device: Any, note: Note | None, tell: Callable[[str], None]) -> None:
        self._task, self._device, self._note, self._tell = task, device, note, tell
        self._watcher: Watcher | None = None
        self.observation: Observation | None = None

    @property
    def verdicts(self) -> tuple[Any, ...]:
        """What was said so far."""
        return tuple(self._watcher.verdicts) if self._watcher is not None else ()

    def __enter__(self) -> WatchedLoop:
        """Begin: peaks begin again from what is held now."""
        self._watcher = Watcher(self._task, find_meter(self._device), note=self._note, tell=self._tell)
        self._watcher.begin_step()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """End; what went wrong in the loop goes on."""
        problem = "" if kind is None else "memory ran out" if kind.__name__ == "OutOfMemoryError" else kind.__name__
        if self._watcher is not None:
            self.observation = self._watcher.finish(problem)

    def steps(self, loader: Iterable[Item], *, per_step: int = 1) -> Iterator[Item]:
        """Yield what a loader yields, counted.

        Args:
            loader: yields batches or micro-batches, as keyword arguments of the model or lists of them.
            per_step: items that make one optimizer step; what is left over at the end counts as one.
        """
        number = 0
        for item in loader:
            self._count(item)
            yield item
            number += 1
            if number % per_step == 0:
                self.step()
        if number % per_step:
            self.step()

    def step(self, loss: Any = None, inputs: Any = None) -> None:
        """Count an optimizer step; call it right after `optimizer.step()`.

        Args:
            loss: of the step, as the loop logs it; only that of the first is read.
            inputs: what was run, a mapping or a list of mappings, unless `steps` has seen it.
        """
        if self._watcher is None:
            return
        if inputs is not None:
            self._count(inputs)
        self._watcher.end_step()
        plan = self._task.plan
        if loss is None or self._watcher.step > 1 or plan is None or plan.workload.recipe.preference is not None:
            return
        steps = plan.strategy.gradient_accumulation_steps
        self._watcher.find(judge_first_loss(1, float(loss), plan.workload.model.vocab_size, steps))

    def aside(self) -> _Aside:
        """Return a context for what is no training step: its time and its peak are kept apart."""
        return _Aside(self._watcher)

    def _count(self, item: Any) -> None:
        if self._watcher is None:
            return
        parts: Sequence[Any] = item if isinstance(item, (list, tuple)) and not isinstance(item, Mapping) else (item,)
        for part in parts:
            self._watcher.add(part)


class _Aside:
    def __init__(self, watcher: Watcher | None) -> None:
        self._watcher = watcher

    def __enter__(self) -> None:
        if self._watcher is not None:
            self._watcher.look()

    def __exit__(self, *_: Any) -> None:
        if self._watcher is not None:
            self._watcher.set_aside()
            self._watcher.begin_step()


def _is_first() -> bool:
    import torch.distributed as dist

    return not is_distributed() or dist.get_rank() == 0


def _find_collective_device(device: Any) -> Any:
    """Return where a collective's tensors live: NCCL needs the rank's GPU."""
    import torch
    import torch.distributed as dist

    if not is_distributed() or dist.get_backend() != "nccl":
        return "cpu"
    return device if device is not None else torch.device("cuda", torch.cuda.current_device())

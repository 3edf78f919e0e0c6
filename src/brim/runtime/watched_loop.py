"""Watching a plain PyTorch loop: `with brim.watch(plan) as w`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from brim.devices.meter import find_meter
from brim.planner.record import Plan
from brim.runtime.judge import judge_first_loss
from brim.runtime.observe import Note, Task, Watcher, say
from brim.runtime.ranks import is_distributed
from brim.runtime.run_record import name_problem
from brim.runtime.survival import read_survival
from brim.spec.observation import Observation
from brim.spec.strategy import Strategy

Item = TypeVar("Item")


def watch(
    plan: Plan | None = None, *, device: Any = None, folder: str | None = None, note: Note | None = None,
    group: Any = None, longest_tokens: int | None = None, num_steps: int | None = None,
    recovery: Any = None, tell: Callable[[str], None] | None = None,
) -> WatchedLoop:  # fmt: skip
    """Return a context that watches a plain loop, as `brim.watch` says; `note` is all that takes the run at its end."""
    strategy = plan.strategy if plan is not None else Strategy(micro_batch_size=1, gradient_accumulation_steps=1)
    task = Task(
        plan=plan, strategy=strategy, coming_tokens=longest_tokens, last_step=num_steps, folder=folder,
        is_first=_is_first(), device=_find_collective_device(device), group=group,
        survival=lambda: read_survival(recovery),
    )  # fmt: skip
    return WatchedLoop(task, device, note, tell or say)


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
        problem = "" if kind is None else name_problem(kind)
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

    def read_log(self) -> dict[str, float]:
        """Return `memory/...` and `speed/...` for a logger; speeds are those since the last call."""
        return self._watcher.read_log() if self._watcher is not None else {}

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

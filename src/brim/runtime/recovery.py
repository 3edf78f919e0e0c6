"""Survive an out-of-memory in a training step: the same window again, in smaller pieces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from torch import nn

from brim.devices.meter import find_meter
from brim.errors import CannotRecover
from brim.runtime.agree import Agreement, AskInside, PeerOutOfMemory, TooLate, ask_in_sharded, can_overlap
from brim.runtime.last_whole import read_record, watch_for_hang, write_record
from brim.runtime.marks import Marks
from brim.runtime.pieces import Inputs, cut_pieces, explain_uncuttable, most_sequences
from brim.runtime.restore import (
    WindowStart,
    discard_gradients,
    find_phase,
    is_out_of_memory,
    is_sharded,
    release_memory,
)
from brim.runtime.safe_step import HalfStepped

Found = TypeVar("Found")
LOGGER = logging.getLogger("brim.recover")
_ROOMY_FRACTION = 0.8
"""A plan whose peak is below this part of the device has room for what it did not foresee."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryEvent:
    """One out-of-memory that was survived."""

    step: int
    """Optimizer steps that had been taken."""
    where: str
    """What ran out: forward, backward, clipping, optimizer step, evaluation."""
    own: bool
    """Whether it was this rank's memory, not another's."""
    old_size: int
    """Sequences of a piece before."""
    new_size: int
    """Sequences of a piece from now on."""
    change: str
    """What was changed."""
    effective_batch_size: int | None = None
    """Sequences of the window on this rank: the same before and after."""

    def __str__(self) -> str:
        who = "out of memory" if self.own else "out of memory on another rank"
        kept = f", same {self.effective_batch_size} sequences a step" if self.effective_batch_size else ""
        return f"step {self.step}: {who} in {self.where}; {self.change}{kept}"


class Ladder:
    """What is tried, in this order, when a window runs out of memory; every rung leaves the result as it is."""

    def __init__(
        self, model: nn.Module, *, size: int | None, blocks: int = 1, checkpointing: bool = True, group: Any = None,
        plan: Any = None, overlap: bool | None = None, folder: Path | None = None, timeout_seconds: float = 600.0,
        save: Callable[[], str | None] = lambda: None, resumes: bool = True,
    ) -> None:  # fmt: skip
        """Stand on the first rung.

        Args:
            model: the module that trains, wrapped or not.
            size: sequences of a piece; None for micro-batches as they come.
            blocks: rows of a sequence, stacked.
            checkpointing: whether activation checkpointing may be turned on.
            group: data-parallel process group; the default one if None.
            plan: the plan that the run follows, or None.
            overlap: whether DDP reduces in the last backward; where the plan has room to spare if None.
            folder: where the split is written down; nowhere if None.
            timeout_seconds: how long a rank may wait for others.
            save: saves the last whole step, on all ranks together, and returns where.
            resumes: whether a split that was written down before is taken up.
        """
        self.model, self.size, self.blocks, self.group = model, size, blocks, group
        self.events: list[RecoveryEvent] = []
        self.num_steps = 0
        self.reduce_each = False
        self.overlap = can_overlap(model) and (is_roomy(plan) if overlap is None else overlap)
        self.folder, self.save, self.plan = folder, save, plan
        self.agreement = Agreement(group, timeout_seconds)
        self.start = WindowStart(model)
        self.also_rewind: Callable[[], None] = lambda: None
        self._checkpointing, self.timeout_seconds = checkpointing, timeout_seconds
        self.cuts = True
        self._again = False
        self._planned_size = size
        if resumes and folder is not None and (kept := read_record(folder)):
            self.size = min(kept["micro_batch_size"], size or kept["micro_batch_size"])
        if is_sharded(model) and self.agreement.num_ranks > 1:
            ask_in_sharded(model, self.agreement)

    def keep_start(self) -> None:
        """A window begins: note what it begins with."""
        quiet_buffers(self.model)
        self.start.keep()
        self._again = False

    def let_go(self) -> None:
        """The window is over and stepped."""
        self.start.let_go()
        self.num_steps += 1

    def cut(self, batches: Sequence[Inputs]) -> list[list[Inputs]]:
        """Return the pieces of each micro-batch."""
        size = self.size if self.cuts else None
        return [cut_pieces(batch, size, self.blocks) for batch in batches]

    def rewind(self, marks: Marks | None = None) -> None:
        """Leave nothing of a failed attempt: no gradient, no buffer, no random number drawn, no metric."""
        discard_gradients(self.model)
        self.start.restore()
        self.also_rewind()
        if marks is not None:
            marks.restore()

    def run(self, attempt: Callable[[], Found], batches: Sequence[Inputs], marks: Marks | None = None) -> Found:
        """Return what an attempt returns once it succeeds on every rank.

        Args:
            attempt: runs the window in pieces of `size` sequences; begins anew each time.
            batches: the micro-batches of this rank's window.
            marks: where counters stood when the window began.

        Raises:
            CannotRecover: no rung of the ladder is left.
        """
        while True:
            found, where = self.try_once(attempt)
            if where is None:
                return found  # type: ignore[return-value]
            self.rewind(marks)
            self.climb_down(where, batches)

    def try_once(self, attempt: Callable[[], Found]) -> tuple[Found | None, str | None]:
        """Return what an attempt returns, or where it ran out of memory, on this rank or another."""
        seconds = self.timeout_seconds if self.agreement.num_ranks > 1 else None
        quiet_buffers(self.model)
        try:
            with watch_for_hang(seconds, self.save_alone), self.agreement.attempt():
                found = attempt()
                self.agreement.check()
                return found, None
        except TooLate as error:
            self.leave(error)
        except Exception as error:
            if not is_out_of_memory(error):
                if self.agreement.num_ranks > 1:  # a lost rank takes the others with it: keep what this one has
                    self.save_alone()
                raise
            where = "" if isinstance(error, PeerOutOfMemory) else find_phase(error)
            release_memory(error)
        return None, where

    def clip(self, clip: Callable[[], Found]) -> tuple[Found | None, str | None]:
        """Return what clipping returns, or where it ran out of memory: half-clipped gradients are of no use."""
        asks = is_sharded(self.model) and self.agreement.num_ranks > 1

        def attempt() -> Found:
            with AskInside(self.agreement) if asks else nullcontext():
                return clip()

        found, where = self.try_once(attempt)
        if where is not None:
            size = self.size or 0
            self.note("clipping" if where else "", size, size, "the window is run again as it was")
        return found, where

    def step(self, act: Callable[[], Found], size: int) -> Found:
        """Return what an optimizer step returns, once every rank has taken it.

        Args:
            act: takes it.
            size: sequences of a piece, for the message.

        Raises:
            CannotRecover: memory ran out where a step cannot be taken apart, on this rank or another.
        """
        half, found = None, None
        try:
            found = act()
        except Exception as error:
            if not (isinstance(error, HalfStepped) or is_out_of_memory(error)):
                raise
            half = str(error)
            release_memory(error)
        if self.agreement.anyone(half is not None):
            raise CannotRecover(
                step=self.num_steps, where="optimizer step", micro_batch_size=size,
                reason=half or "another rank could not finish it",
            )  # fmt: skip
        return found  # type: ignore[return-value]

    def note_step(self, size: int) -> None:
        """Say that an optimizer step ran out of memory and was finished."""
        self.note("optimizer step", size, size, "what was half written is put back and written again")

    def leave(self, error: TooLate) -> NoReturn:
        """Save what this rank has and stop: the others wait in a collective, and end when this one is gone.

        Raises:
            CannotRecover: always.
        """
        self.save_alone()
        where = find_phase(error.__cause__ or error)
        self._stop(where, self.size or 0, f"{error}; a restarted run begins with a smaller split", alone=True)

    def climb_down(self, where: str, batches: Sequence[Inputs]) -> None:
        """Change what is next on the ladder, alike on every rank.

        Args:
            where: where this rank ran out of memory; empty if another did.
            batches: the micro-batches of this rank's window.
        """
        reason = next((r for batch in batches if (r := explain_uncuttable(batch, self.blocks))), None)
        reason = reason if self.cuts else "its rows are no sequences (several are packed into one)"
        mine = min(self.size or most_sequences(batches, self.blocks), most_sequences(batches, self.blocks))
        old, uncuttable = self.agreement.gather_worst([mine, int(reason is not None)])
        new = old if uncuttable or old == 1 else -(-old // 2)
        change = f"micro-batch {old} -> {new}" if new < old else self._change_otherwise()
        if change is None:
            self._stop(where or "another rank", old, reason or "one sequence at a time is the smallest split")
        self.size = new if new < old else self.size
        self.overlap = False
        self.note(where, old, new, change, sum(most_sequences([batch], self.blocks) for batch in batches))

    def shrink_evaluation(self, batch: Inputs, size: int | None, own: bool) -> int:
        """Return the sequences of an evaluation's pieces after one ran out of memory; training keeps its own.

        Raises:
            CannotRecover: there is nothing smaller.
        """
        reason = explain_uncuttable(batch, self.blocks) if self.cuts else "its rows are no sequences"
        mine = min(size or most_sequences([batch], self.blocks), most_sequences([batch], self.blocks))
        old, uncuttable = self.agreement.gather_worst([mine, int(reason is not None)])
        if uncuttable or old == 1:
            self._stop("evaluation", old, reason or "one sequence at a time is the smallest split")
        new = -(-old // 2)
        self.note("evaluation" if own else "", old, new, f"evaluation batch {old} -> {new}, training as before")
        return new

    def note(self, where: str, old: int, new: int, change: str, sequences: int | None = None) -> None:
        """Say in one line what was survived."""
        event = RecoveryEvent(
            step=self.num_steps, where=where or "the same window", own=bool(where), old_size=old, new_size=new,
            change=change, effective_batch_size=sequences,
        )  # fmt: skip
        self.events.append(event)
        LOGGER.warning("%s", event)
        if self.folder is not None and new < old and "evaluation" not in change and self.agreement.is_first:
            write_record(self.folder, micro_batch_size=new, step=self.num_steps, event=str(event))

    def grow(self, size: int | None = None) -> None:
        """Let later windows have larger pieces again: twice as large, or `size`; never beyond what was planned.

        Ranks call it together.
        """
        if self.size is not None:
            wanted = size or 2 * self.size
            self.size = min(wanted, self._planned_size) if self._planned_size else wanted

    def save_alone(self) -> None:
        """Save what this rank can without the others; replaced by who knows how."""

    def _change_otherwise(self) -> str | None:
        """Return what is changed where pieces cannot be smaller; None if nothing is left."""
        if is_sharded(self.model) and not self.reduce_each:
            self.reduce_each = True
            return "gradients are reduced after every micro-batch, none is held whole"
        if not self._again:
            self._again = True
            return "free blocks given back, tried once more"
        if self._checkpointing and turn_on_checkpointing(self.model):
            self._again = False
            return "activation checkpointing turned on"
        return None

    def _stop(self, where: str, size: int, reason: str, *, alone: bool = False) -> NoReturn:
        saved = (str(self.folder) if self.folder is not None else None) if alone else self.save()
        meter = find_meter(next(self.model.parameters()).device)
        raise CannotRecover(
            step=self.num_steps, where=where, micro_batch_size=size, reason=reason, saved=saved,
            capacity_bytes=meter.capacity_bytes if meter is not None else None, relaxations=list_ways_out(self.plan),
        )  # fmt: skip


def quiet_buffers(model: nn.Module) -> None:
    """Keep DDP from broadcasting buffers in the next forward pass: they are alike, and it would ask nobody before."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.require_forward_param_sync = False


def turn_on_checkpointing(model: nn.Module) -> bool:
    """Turn activation checkpointing on where the model offers it; return whether it was off and is on now."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    offers = getattr(inner, "supports_gradient_checkpointing", False)
    if not offers or getattr(inner, "is_gradient_checkpointing", True):
        return False
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return True


def is_roomy(plan: Any) -> bool:
    """Return whether a plan leaves so much memory that ranks need not agree before every reduction."""
    if plan is None:
        return False
    return plan.estimate.peak_reserved_bytes + plan.estimate.margin_bytes < _ROOMY_FRACTION * plan.capacity_bytes


def list_ways_out(plan: Any) -> list[str]:
    """Return changes of the job that need less memory, cheapest first, as the user would type them."""
    if plan is None:
        return []
    from brim.planner.answerer import answer_by_formula
    from brim.planner.relax import list_relaxations

    fixed = {"micro_batch_size": 1, "activation_checkpointing": plan.strategy.activation_checkpointing}
    found = list_relaxations(plan.workload, fixed, answer_by_formula())
    less = [one for one in found if one.peak_allocated_bytes < plan.estimate.peak_allocated_bytes]
    return [f"{one.change} ({one.effect})" for one in less]

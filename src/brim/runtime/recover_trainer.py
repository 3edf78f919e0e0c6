"""Hugging Face's training loop survives an out-of-memory: the window is run again with its last micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from brim.runtime.accumulate import reducing
from brim.runtime.agree import PeerOutOfMemory, TooLate, reduce_gradients
from brim.runtime.last_whole import watch_for_hang
from brim.runtime.marks import Marks
from brim.runtime.pieces import Inputs, count_sequences, cut_pieces
from brim.runtime.recover_loop import install, make_ladder, owns_gradients
from brim.runtime.recovery import Ladder, RecoveryEvent
from brim.runtime.restore import discard_gradients, find_phase, is_out_of_memory, is_sharded, release_memory
from brim.runtime.trainer import ExactAccumulation
from brim.runtime.window import open_window


class RecoveringTrainer(ExactAccumulation):
    """Mixin that makes a `transformers.Trainer` exact and lets it survive an out-of-memory.

    The loop calls `training_step` once for each micro-batch and steps after the last of them. A micro-batch that runs
    out of memory is noted, and those after it are skipped; in the last one ranks agree, and the window is run again in
    smaller pieces. The loop sees the same micro-batches, the same loss and one step.

    Leaves out: an out-of-memory while batches are fetched, DeepSpeed and Megatron, whose engines hold the gradients.
    """

    _recover_ladder: Ladder | None = None
    _recover_for: tuple[Any, Any] = (None, None)
    _recover_plan: Any = None
    _recover_asked: bool = False
    _recover_window: _Attempt | None = None
    _recover_undo: list[Callable[[], None]] | None = None
    _recover_eval_size: int | None = None

    @property
    def recovery(self) -> Ladder | None:
        """What is done about an out-of-memory: `recovery.size`, `recovery.events`, `recovery.grow()`; None before."""
        return self._recover_ladder

    @property
    def recovery_events(self) -> list[RecoveryEvent]:
        """What was survived so far."""
        return self._recover_ladder.events if self._recover_ladder is not None else []

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any) -> tuple[list[Any], None]:
        """Return the micro-batches of one optimizer step, and note what the window begins with."""
        found, none = super().get_batch_samples(epoch_iterator, num_batches, *args)
        if not found or self._exact_window is None:
            return found, none
        real = found[: len(self._exact_window.counts)]
        ladder = self._recover_begin(real)
        if ladder is None:
            return found, none
        self._recover_window = _Attempt(self, real, len(found))
        ladder.num_steps = self.state.global_step
        ladder.keep_start()
        return found, none

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch, or the whole window again; return what it adds to the window's loss."""
        window = self._recover_window
        if window is None:
            return super().training_step(model, inputs, *args, **kwargs)

        def run(piece: Inputs) -> Tensor:
            return super(RecoveringTrainer, self).training_step(model, piece, *args, **kwargs)

        return window.run_next(model, run)

    def prediction_step(self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the predictions of one evaluation batch, in pieces where it is too large; training is not changed."""
        ladder = self._recover_begin([inputs])
        if ladder is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        while True:
            marks, known = Marks(self), len(self._exact_evaluated or ())
            pieces = cut_pieces(inputs, self._recover_eval_size if ladder.cuts else None, ladder.blocks)
            found, where = ladder.try_once(
                lambda pieces=pieces: [super(RecoveringTrainer, self).prediction_step(model, piece, *args, **kwargs)
                                       for piece in pieces]
            )  # fmt: skip
            if where is None:
                return found[0] if len(found) == 1 else _join(found, [self._recover_weigh(piece) for piece in pieces])
            marks.restore()
            if self._exact_evaluated is not None:
                del self._exact_evaluated[known:]
            self._recover_eval_size = ladder.shrink_evaluation(inputs, self._recover_eval_size, bool(where))

    def forget_window(self) -> None:
        """Take back what the guard has put on the model, the optimizer and the trainer."""
        for undo in self._recover_undo or ():
            undo()
        super().forget_window()
        for name in [name for name in vars(self) if name.startswith("_recover_")]:
            delattr(self, name)

    def _recover_begin(self, batches: Sequence[Inputs]) -> Ladder | None:
        """Return the ladder of the model and optimizer that train now; None where gradients are not the loop's own."""
        now = (self.model_wrapped if self.is_in_train else self.model, self.optimizer)
        if any(one is not other for one, other in zip(self._recover_for, now, strict=True)):
            for undo in self._recover_undo or ():
                undo()
            events, self._recover_for, self._recover_undo = self.recovery_events, now, []
            self._recover_ladder = make_ladder(self, now[0], batches) if owns_gradients(self, now[0]) else None
            if self._recover_ladder is not None:
                self._recover_ladder.events += events
                self._recover_undo = list(install(self, self._recover_ladder))
        return self._recover_ladder

    def _recover_weigh(self, inputs: Inputs) -> float:
        form = self._exact_form
        return float(form.rule.count(inputs)) if form is not None else float(count_sequences(inputs))


class _Attempt:
    """The window that the loop is in."""

    def __init__(self, trainer: Any, batches: Sequence[Inputs], num_calls: int) -> None:
        self._trainer, self._batches, self._left = trainer, batches, num_calls
        self._ladder: Ladder = trainer._recover_ladder
        self._marks = Marks(trainer)
        self._failed: str | None = None
        self.reduces = False
        self._given: Any = 0.0
        self._pieces = self._ladder.cut(batches)
        if sum(map(len, self._pieces)) != len(batches) or self._ladder.agreement.num_ranks > 1:
            self._open()
        self._ran = self._call = 0
        self._ladder.agreement.is_open = True

    def run_next(self, model: Any, run: Callable[[Inputs], Tensor]) -> Tensor:
        """Run the micro-batch that the loop is at; the whole window, where one has failed and this is the last."""
        self._left -= 1
        found: Any = None
        seconds = self._ladder.timeout_seconds if self._ladder.agreement.num_ranks > 1 else None
        if self._failed is None:
            with watch_for_hang(seconds, self._ladder.save_alone):
                found = self._try(model, run)
        if self._left == 0 and self._failed is not None:
            self._rerun = lambda: self._run_whole(model, run)
            self._ladder.rewind(self._marks)
            self._ladder.climb_down(self._failed, self._batches)
            return self._ladder.run(self._rerun, self._batches, self._marks) - self._given
        if self._left == 0:
            self._rerun = lambda: self._run_whole(model, run)
        found = torch.zeros((), device=self._trainer.args.device) if found is None else found
        self._given = self._given + found
        return found

    def rerun(self) -> None:
        """Run the window again as it was: its gradients were lost after they were whole."""
        self._ladder.rewind(self._marks)
        self._ladder.run(self._rerun, self._batches, self._marks)

    def _try(self, model: Any, run: Callable[[Inputs], Tensor]) -> Any:
        found = None
        try:
            mine = self._pieces[self._call] if self._call < len(self._pieces) else []
            self._call += 1
            if self._left == 0:
                flat = [piece for pieces in self._pieces for piece in pieces]
                spare = self._trainer._exact_window.most_micro_batches - self._ran - len(mine)
                mine = [*mine, *[flat[-1]] * spare]
            for piece in mine:
                share = self._run_piece(model, run, piece)
                found = share if found is None else found + share
            if self._left == 0:
                self._finish(model)
            return found
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._failed = "" if isinstance(error, PeerOutOfMemory) else find_phase(error)
            try:
                self._ladder.agreement.tell(error)
            except TooLate as late:
                self._ladder.leave(late)
            release_memory(error)
        discard_gradients(model)
        return None

    def _run_whole(self, model: Any, run: Callable[[Inputs], Tensor]) -> Tensor:
        self._pieces = self._ladder.cut(self._batches)
        self._open()
        self._ran = 0
        pieces = [piece for pieces in self._pieces for piece in pieces]
        total: Any = 0.0
        for index in range(self._trainer._exact_window.most_micro_batches):
            total = total + self._run_piece(model, run, pieces[min(index, len(pieces) - 1)])
        self._finish(model)
        return total

    def _open(self) -> None:
        trainer, agreement = self._trainer, self._ladder.agreement
        flat = [piece for pieces in self._pieces for piece in pieces]
        trainer._exact_window = open_window(trainer._exact_form, flat, "cpu", agreement.group, agreement.check)
        trainer._exact_index = -1
        if trainer._exact_auxiliary is not None:
            trainer._exact_auxiliary.take()

    def _run_piece(self, model: Any, run: Callable[[Inputs], Tensor], piece: Inputs) -> Tensor:
        ladder = self._ladder
        self._ran += 1
        last = self._ran == self._trainer._exact_window.most_micro_batches
        self.reduces = last and ladder.overlap
        with reducing(model, is_sharded(model) and (last or ladder.reduce_each)):
            return run(piece)

    def _finish(self, model: Any) -> None:
        if not self._ladder.overlap:
            reduce_gradients(model, self._ladder.agreement)
        self._ladder.agreement.check()
        self._ladder.agreement.is_open = False


def _join(found: Sequence[Any], weights: Sequence[float]) -> Any:
    """Return one prediction of several: the mean of losses, rows of the rest one under another."""
    losses, logits, labels = zip(*found, strict=True)
    total = sum(weights) or 1.0
    loss = None if losses[0] is None else sum(w * one for w, one in zip(weights, losses, strict=True)) / total
    return loss, _stack(logits), _stack(labels)


def _stack(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts)) if parts[0].dim() else torch.stack(list(parts)).mean()
    if isinstance(parts[0], (list, tuple)):
        return type(parts[0])(_stack(column) for column in zip(*parts, strict=True))
    if isinstance(parts[0], Mapping):
        return {key: _stack([part[key] for part in parts]) for key in parts[0]}
    return parts[0]

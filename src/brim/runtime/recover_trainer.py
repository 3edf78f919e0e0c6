"""Hugging Face's training loop survives an out-of-memory: the window is run again with its last micro-batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brim.errors import CannotRecover
from brim.losses.rules import count_rows
from brim.losses.views import take_rows
from brim.runtime.accumulate import reducing
from brim.runtime.agree import PeerOutOfMemory, reduce_gradients, start_reducing
from brim.runtime.last_whole import watch_for_hang, write_record
from brim.runtime.marks import Marks
from brim.runtime.pieces import Inputs, count_sequences, cut_pieces
from brim.runtime.recovery import Ladder, RecoveryEvent
from brim.runtime.restore import discard_gradients, find_phase, is_out_of_memory, is_sharded, release_memory
from brim.runtime.safe_step import HalfStepped, SafeStep
from brim.runtime.trainer import ExactAccumulation
from brim.runtime.trainer_loop import collate_parts
from brim.runtime.window import open_window

_COLLECTIVES = ("gather", "gather_for_metrics", "reduce", "pad_across_processes")


class RecoveringTrainer(ExactAccumulation):
    """Mixin that makes a `transformers.Trainer` exact and lets it survive an out-of-memory.

    The loop calls `training_step` once for each micro-batch and steps after the last of them. A micro-batch that runs
    out of memory is noted, and those after it are skipped; in the last one ranks agree, and the window is run again in
    smaller pieces. The loop sees the same micro-batches, the same loss and one step.

    Leaves out: an out-of-memory while batches are fetched, DeepSpeed and Megatron, whose engines hold the gradients.
    """

    _recover_ladder: Ladder | None = None
    _recover_plan: Any = None
    _recover_window: _Attempt | None = None
    _recover_undo: list[Callable[[], None]] | None = None
    _recover_eval_size: int | None = None

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
        while True:
            marks, known = Marks(self), len(self._exact_evaluated or ())
            pieces = cut_pieces(inputs, self._recover_eval_size, ladder.blocks)
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

    def _recover_begin(self, batches: Sequence[Inputs]) -> Ladder:
        """Return the ladder of the model and optimizer that train now."""
        model = self.model_wrapped if self.is_in_train else self.model
        if self._recover_ladder is None or self._recover_ladder.model is not model:
            for undo in self._recover_undo or ():
                undo()
            kept = self._recover_ladder
            self._recover_ladder = _make_ladder(self, model, batches)
            self._recover_ladder.events += kept.events if kept is not None else []
            self._recover_undo = list(_install(self, self._recover_ladder))
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
        self._pieces = [cut_pieces(batch, self._ladder.size, self._ladder.blocks) for batch in batches]
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
        agreement, found = self._ladder.agreement, None
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
            if agreement.is_open:
                agreement.is_open = False
                agreement.anyone(True)
            release_memory(error)
        discard_gradients(model)
        return None

    def _run_whole(self, model: Any, run: Callable[[Inputs], Tensor]) -> Tensor:
        self._pieces = [cut_pieces(batch, self._ladder.size, self._ladder.blocks) for batch in self._batches]
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


def _make_ladder(trainer: Any, model: Any, batches: Sequence[Inputs]) -> Ladder:
    blocks = _find_blocks(trainer, batches[0])
    folder = Path(trainer.args.output_dir)
    restarted = trainer.state.global_step > 0 or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    def save() -> str | None:
        if not trainer.state.global_step:
            return None
        trainer._save_checkpoint(trainer.model, trial=None)
        return str(folder / f"checkpoint-{trainer.state.global_step}")

    ladder = Ladder(
        model, size=None, blocks=blocks or 1, plan=trainer._recover_plan, folder=folder, save=save, resumes=restarted,
        timeout_seconds=float(trainer.args.ddp_timeout),
    )  # fmt: skip
    ladder.cuts = blocks is not None

    def save_alone() -> None:
        size = max((ladder.size or trainer.args.train_batch_size) // 2, 1)
        write_record(folder, micro_batch_size=size, step=trainer.state.global_step, event="a rank was left waiting")

    ladder.save_alone = save_alone  # type: ignore[method-assign]
    return ladder


def _find_blocks(trainer: Any, batch: Inputs) -> int | None:
    """Return how many rows, stacked in blocks, belong to a sequence; None where rows are no sequences (packed).

    A few sequences of the dataset are collated, together and one alone, and their rows compared.
    """
    with suppress(Exception):  # a collator may refuse to be called so: then the batch alone has to say
        parts = next(collate_parts(trainer), None)
        if parts is not None:
            whole, first = count_rows(parts.whole), count_rows(parts.first)
            blocks = first if first in (1, 2) and whole > first and whole % first == 0 else None
            return blocks if blocks and _starts_with(parts.whole, parts.first, blocks) else None
    rows, size = count_rows(batch), max(trainer.args.train_batch_size, 1)
    return 2 if rows == 2 * size else 1 if rows > 1 or size == 1 else None


def _starts_with(whole: Inputs, first: Inputs, blocks: int) -> bool:
    """Return whether the first sequence, cut out of a batch, is the one that was collated alone."""
    cut = take_rows(whole, count_rows(whole), blocks, 0, 1)
    for key, value in first.items():
        other = cut.get(key)
        if isinstance(value, Tensor) and value.dim() == 2 and isinstance(other, Tensor) and other.dim() == 2:
            width = min(value.shape[1], other.shape[1])
            left = torch.equal(value[:, :width], other[:, :width])
            if value.shape[0] != other.shape[0] or not (left or torch.equal(value[:, -width:], other[:, -width:])):
                return False
    return True


def _install(trainer: Any, ladder: Ladder) -> Iterator[Callable[[], None]]:
    """Put recovery into clipping, stepping and the collectives of metrics; yield what takes it out again."""
    accelerator = trainer.accelerator

    if ladder.agreement.num_ranks > 1:
        for name in _COLLECTIVES:
            yield _replace(accelerator, name, ladder.agreement.ask_before(getattr(accelerator, name)))
    if ladder.overlap:
        yield _replace(accelerator, "backward", _make_backward(trainer, ladder, accelerator.backward))
    if trainer.optimizer is None:
        return
    yield _replace(accelerator, "clip_grad_norm_", _make_clip(trainer, ladder, accelerator.clip_grad_norm_))
    optimizer, outer = trainer.optimizer, []
    while hasattr(optimizer, "optimizer"):
        outer.append(optimizer)
        optimizer = optimizer.optimizer
    step = _make_step(trainer, ladder, optimizer)
    yield _replace(optimizer, "step", step)
    for wrapper in outer:
        if getattr(wrapper, "scaler", None) is not None:  # it swaps the step itself, for one that it kept
            from accelerate.optimizer import patch_optimizer_step

            yield _replace(wrapper, "_optimizer_original_step_method", step)
            yield _replace(wrapper, "_optimizer_patched_step_method", patch_optimizer_step(wrapper, step))


def _make_backward(trainer: Any, ladder: Ladder, theirs: Callable[..., Any]) -> Callable[..., Any]:
    def backward(loss: Tensor, **kwargs: Any) -> Any:
        window = trainer._recover_window
        if window is not None and window.reduces:
            start_reducing(ladder.model, loss, ladder.agreement)
        return theirs(loss, **kwargs)

    return backward


def _make_clip(trainer: Any, ladder: Ladder, theirs: Callable[..., Any]) -> Callable[..., Any]:
    def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = list(parameters) if not isinstance(parameters, Tensor) else parameters
        while True:
            found, where = ladder.try_once(lambda: theirs(parameters, *args, **kwargs))
            window = trainer._recover_window
            if where is None:
                return found
            if window is None:
                raise CannotRecover(
                    step=trainer.state.global_step, where="clipping", micro_batch_size=ladder.size or 0,
                    reason="no window to run again",
                )  # fmt: skip
            size = ladder.size or trainer.args.train_batch_size
            ladder.note("clipping" if where else "", size, size, "the window is run again as it was")
            window.rerun()

    return clip


def _make_step(trainer: Any, ladder: Ladder, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    def note(error: BaseException) -> None:
        size = ladder.size or trainer.args.train_batch_size
        ladder.note("optimizer step", size, size, "what was half written is put back and written again")

    safe = SafeStep(optimizer, note)

    def step(closure: Any = None) -> Any:
        half, found = None, None
        try:
            found = safe(closure)
        except Exception as error:
            if not (isinstance(error, HalfStepped) or is_out_of_memory(error)):
                raise
            half = str(error)
            release_memory(error)
        if ladder.agreement.anyone(half is not None):
            raise CannotRecover(
                step=trainer.state.global_step, where="optimizer step",
                micro_batch_size=ladder.size or trainer.args.train_batch_size,
                reason=half or "another rank could not finish it",
            )  # fmt: skip
        ladder.let_go()
        trainer._recover_window = None
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return found

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # torch's schedules look for it, and count by it
    return step


def _replace(holder: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of one object; return what puts back what was there."""
    had, before = name in vars(holder), vars(holder).get(name)
    setattr(holder, name, value)

    def undo() -> None:
        if vars(holder).get(name) is value:
            setattr(holder, name, before) if had else delattr(holder, name)

    return undo


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

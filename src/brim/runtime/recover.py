"""A whole optimizer step in plain PyTorch that an out-of-memory does not end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brim.errors import CannotRecover, InvalidInput, Unrecoverable
from brim.losses.form import AuxiliaryTap, LossForm
from brim.runtime.accumulate import measure_model, reducing, unwrap_model
from brim.runtime.agree import reduce_gradients, start_reducing
from brim.runtime.last_whole import load_shard, save_shard, write_record
from brim.runtime.pieces import Inputs, cut_pieces, explain_uncuttable
from brim.runtime.ranks import is_distributed
from brim.runtime.recoverable import explain_unrecoverable
from brim.runtime.recovery import Ladder, RecoveryEvent
from brim.runtime.restore import forget_scaling, is_sharded
from brim.runtime.safe_step import SafeStep
from brim.runtime.window import Window, open_window


class Recovery:
    """Runs optimizer steps that survive an out-of-memory, and train as if there had been none.

        recovery = brim.Recovery(model, optimizer, micro_batch_size=8, max_grad_norm=1.0)
        for batch in loader:  # the effective batch of this rank
            loss = recovery.step(batch)
            scheduler.step()

    A window that runs out of memory, in forward, backward, clipping or the optimizer step, is run again from its own
    sequences in smaller micro-batches: same sequences, same denominator, one optimizer step; random state and buffers
    are those of its start. Later windows keep the smaller micro-batch. At one sequence activation checkpointing is
    turned on if the model offers it; then the last whole step is saved and `CannotRecover` says what would help.

    Under DDP and FSDP2 ranks agree before each collective, so that none waits for one that has failed.

    Leaves out: optimizers other than `safe_step.COVERED` (an out-of-memory inside their step stops the run), rows that
    cannot be cut (packed sequences, image patches), loss kernels that draw random numbers: a window run again draws
    others, as any other micro-batch size would.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, micro_batch_size: int | None = None,
        loss: Callable[[Inputs], Tensor] | None = None, form: LossForm | None = None,
        max_grad_norm: float | None = None, scaler: Any = None, plan: Any = None, folder: str | Path | None = None,
        blocks: int = 1, checkpointing: bool = True, overlap: bool | None = None, timeout_seconds: float = 600.0,
        group: Any = None,
    ) -> None:  # fmt: skip
        """Begin with nothing stepped. Under several ranks a collective: each makes its own at the same place.

        Args:
            model: the module, wrapped by DDP or FSDP2 or not.
            optimizer: over its parameters.
            micro_batch_size: sequences of a micro-batch to begin with; the plan's, or what `step` gets, if None.
            loss: returns the loss of a micro-batch, where it is not `model(**inputs).loss`.
            form: what the loss averages over, where it is known; measured on a few sequences if None.
            max_grad_norm: what gradients are clipped to, if at all.
            scaler: a `torch.amp.GradScaler`, which scales, unscales, steps and is updated here.
            plan: the plan that the run follows; says what would help if nothing is left to try.
            folder: where the last whole step and the split are kept when a run ends; nothing is written if None.
            blocks: rows of one sequence, stacked: 2 where all chosen rows come before all rejected ones.
            checkpointing: whether activation checkpointing may be turned on.
            overlap: whether DDP reduces while the last backward runs, which cannot be taken back; where the plan has
                room to spare if None, and never after an out-of-memory.
            timeout_seconds: how long a rank may wait for the others before it saves its part and ends with code 75, for
                torchrun to restart the run; torch 2.13's does so dependably with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
            group: data-parallel process group; the default one if None.

        Raises:
            InvalidInput: a micro-batch of less than one sequence.
            Unrecoverable: model or optimizer keep something that a window run again could not put back.
        """
        if (reason := explain_unrecoverable(model, optimizer, scaler, group)) is not None:
            raise Unrecoverable(reason=reason)
        if micro_batch_size is None and plan is not None:
            micro_batch_size = plan.strategy.micro_batch_size
        if micro_batch_size is not None and micro_batch_size < 1:
            raise InvalidInput(f"micro_batch_size must be 1 or more sequences, not {micro_batch_size}")
        self.model, self.optimizer = model, optimizer
        self._loss, self._form, self._max_norm, self._group = loss, form, max_grad_norm, group
        self._scaler = scaler
        self._folder = Path(folder) if folder is not None else None
        self._ladder = Ladder(
            model, size=micro_batch_size, blocks=blocks, checkpointing=checkpointing, group=group, plan=plan,
            overlap=overlap, folder=self._folder, timeout_seconds=timeout_seconds, save=self.save,
        )  # fmt: skip
        self._ladder.save_alone = self._save_alone  # type: ignore[method-assign]
        self._ladder.also_rewind = lambda: forget_scaling(scaler)
        self._safe = SafeStep(optimizer, lambda error: self._ladder.note_step(self._ladder.size or 0))
        self._tap: AuxiliaryTap | None = None

    @property
    def events(self) -> list[RecoveryEvent]:
        """What was survived so far."""
        return self._ladder.events

    @property
    def num_steps(self) -> int:
        """Optimizer steps taken, those of a run before this one that was resumed included."""
        return self._ladder.num_steps

    @property
    def micro_batch_size(self) -> int | None:
        """Sequences of a micro-batch now; None while nothing asked for less than what `step` gets."""
        return self._ladder.size

    def grow(self, micro_batch_size: int | None = None) -> None:
        """Let later steps have larger micro-batches again, twice as large if no size is given; all ranks together."""
        self._ladder.grow(micro_batch_size)

    def step(self, batch: Inputs | Sequence[Inputs]) -> Tensor:
        """Run one optimizer step; return this rank's share of the loss: averaged over ranks the loss of the batch.

        Args:
            batch: keyword arguments of the model with rows first, or micro-batches, already collated.

        Raises:
            CannotRecover: nothing is left to try; weights are those of the last whole step unless it says otherwise.
            InseparableLoss: the loss is no weighted mean of its micro-batches' losses.
        """
        batches = list(batch) if not hasattr(batch, "keys") else [batch]
        if not batches:
            raise InvalidInput("no micro-batch; give every rank at least one (its labels may all be -100)")
        ladder = self._ladder
        ladder.keep_start()
        if self._form is None:
            self._measure(batches)
        found = ladder.run(lambda: self._train(batches), batches)
        while not self._clip():
            ladder.rewind()
            found = ladder.run(lambda: self._train(batches), batches)
        self._step()
        ladder.let_go()
        return found

    def save(self) -> str | None:
        """Save this rank's part of the last whole step; return the folder, None if none was given."""
        if self._folder is None:
            return None
        save_shard(
            self._folder, self._rank, self.model, self.optimizer, self._ladder.num_steps, self._ladder.start
        )  # fmt: skip
        return str(self._folder)

    def resume(self) -> int:
        """Return the number of steps that a run before this one has taken, with its weights put back; 0 if none.

        Raises:
            CannotRecover: ranks hold parts of different steps.
        """
        if self._folder is None:
            return 0
        taken = load_shard(self._folder, self._rank, self.model, self.optimizer) or 0
        most, least = self._ladder.agreement.gather_worst([taken, -taken])
        if most != -least:
            raise CannotRecover(
                step=most, where="resuming", micro_batch_size=self.micro_batch_size or 0, saved=str(self._folder),
                reason=f"ranks hold steps {-least} to {most}",
            )  # fmt: skip
        self._ladder.num_steps = taken
        return taken

    @property
    def _rank(self) -> int:
        return dist.get_rank() if is_distributed() else 0

    def _measure(self, batches: Sequence[Inputs]) -> None:
        """Find what the loss averages over, on as many sequences as there is memory for."""
        ladder, size = self._ladder, max(min(self._ladder.size or 4, 4), 2)
        cuttable = explain_uncuttable(batches[0], ladder.blocks) is None
        while self._form is None:
            sample = cut_pieces(batches[0], size if cuttable else None, ladder.blocks)[:1]
            self._form, where = ladder.try_once(
                lambda sample=sample: measure_model(self.model, self._loss, sample, sample, self._group)
            )
            if where is not None:
                ladder.rewind()
                if size == 2 or not cuttable:
                    ladder.climb_down(where, sample)
                size = 2

    def _train(self, batches: Sequence[Inputs]) -> Tensor:
        """Run forward and backward of a window, and reduce its gradients; return this rank's share of the loss."""
        ladder, model = self._ladder, self.model
        pieces = [piece for cut in ladder.cut(batches) for piece in cut]
        window = open_window(self._form, pieces, "cpu", ladder.agreement.group, ladder.agreement.check)
        if self._form.auxiliary and self._tap is None:
            self._tap = AuxiliaryTap(unwrap_model(model))
        total: Any = 0.0
        for index in range(window.most_micro_batches):
            last = index == window.most_micro_batches - 1
            inputs = window.prepare(index, pieces[min(index, len(pieces) - 1)])
            with reducing(model, is_sharded(model) and (last or ladder.reduce_each)):
                total = total + self._run_piece(window, index, inputs, reduces=last and ladder.overlap)
        if not ladder.overlap:
            reduce_gradients(model, ladder.agreement, self._group)
        return total

    def _run_piece(self, window: Window, index: int, inputs: Inputs, *, reduces: bool) -> Tensor:
        value = self._loss(inputs) if self._loss is not None else self.model(**inputs).loss
        share = window.scale(index, value, self._tap.take() if self._tap is not None else None)
        if reduces:
            start_reducing(self.model, share, self._ladder.agreement)
        (share if self._scaler is None else self._scaler.scale(share)).backward()
        return share.detach()

    def _clip(self) -> bool:
        """Clip gradients; return whether it was done on every rank."""
        if self._max_norm is None and self._scaler is None:
            return True
        return self._ladder.clip(self._clip_once)[1] is None

    def _clip_once(self) -> None:
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        if self._max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._max_norm)

    def _step_once(self) -> None:
        if self._scaler is None:
            self._safe()
            return
        self.optimizer.step = self._safe  # the scaler calls it, unless gradients overflowed
        try:
            self._scaler.step(self.optimizer)
        finally:
            del self.optimizer.step

    def _step(self) -> None:
        """Step, and make sure that every rank has."""
        try:
            self._ladder.step(self._step_once, self._ladder.size or 0)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        if self._scaler is not None:
            self._scaler.update()

    def _save_alone(self) -> None:
        """A rank was left waiting: its own part of the last whole step, and the split of the run that comes next."""
        if self._folder is not None:
            size = self._ladder.size or 2
            write_record(
                self._folder, micro_batch_size=max(size // 2, 1), step=self._ladder.num_steps,
                event="a rank was left waiting in a collective",
            )  # fmt: skip
            self.save()

"""What recovery puts into the training loop of a Hugging Face trainer, and takes out again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from brim.errors import CannotRecover, Unrecoverable
from brim.losses.rules import count_rows
from brim.losses.views import take_rows
from brim.runtime.agree import start_reducing
from brim.runtime.last_whole import write_record
from brim.runtime.pieces import Inputs
from brim.runtime.ranks import is_distributed
from brim.runtime.recoverable import explain_unrecoverable
from brim.runtime.recovery import LOGGER, Ladder
from brim.runtime.restore import forget_scaling, is_sharded
from brim.runtime.safe_step import SafeStep
from brim.runtime.trainer_loop import collate_parts

_COLLECTIVES = ("gather", "gather_for_metrics", "reduce", "pad_across_processes")


def owns_gradients(trainer: Any, model: Any) -> bool:
    """Return whether the gradients of a step lie in the model's parameters, as a window that is run again needs.

    Raises:
        Unrecoverable: they do not, and recovery was asked for by name; where it was not, the run goes on without.
    """
    kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
    alone = not is_distributed() or dist.get_world_size() == 1 or not trainer.is_in_train
    shared = isinstance(model, torch.nn.parallel.DistributedDataParallel) or is_sharded(model)
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA", "TP") or not (alone or shared):
        reason = f"{kind} keeps gradients to itself: use DDP or FSDP2"
    elif getattr(trainer.accelerator, "has_lomo_optimizer", False):
        reason = "LOMO steps inside backward: use another optimizer"
    else:
        optimizer, _ = unwrap_optimizer(trainer.optimizer)
        reason = explain_unrecoverable(model, optimizer, getattr(trainer.accelerator, "scaler", None))
    if reason is not None and trainer._recover_asked:
        raise Unrecoverable(reason=f"{reason}; or train with recover=False")
    if reason is not None:
        LOGGER.warning("an out-of-memory would end this run: %s", reason)
    return reason is None


def unwrap_optimizer(optimizer: Any) -> tuple[Any, list[Any]]:
    """Return the innermost optimizer, and what is wrapped around it."""
    outer = []
    while hasattr(optimizer, "optimizer"):
        outer.append(optimizer)
        optimizer = optimizer.optimizer
    return optimizer, outer


def make_ladder(trainer: Any, model: Any, batches: Sequence[Inputs]) -> Ladder:
    """Return the ladder of a trainer: its checkpoints, its folder, what its rows are. A collective."""
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
    ladder.also_rewind = lambda: forget_scaling(getattr(trainer.accelerator, "scaler", None))
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


def install(trainer: Any, ladder: Ladder) -> Iterator[Callable[[], None]]:
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
    optimizer, outer = unwrap_optimizer(trainer.optimizer)
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
            found, where = ladder.clip(lambda: theirs(parameters, *args, **kwargs))
            window = trainer._recover_window
            if where is None:
                return found
            if window is None:
                raise CannotRecover(
                    step=trainer.state.global_step, where="clipping", micro_batch_size=ladder.size or 0,
                    reason="no window to run again",
                )  # fmt: skip
            window.rerun()

    return clip


def _make_step(trainer: Any, ladder: Ladder, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    def find_size() -> int:
        return ladder.size or trainer.args.train_batch_size

    safe = SafeStep(optimizer, lambda error: ladder.note_step(find_size()))

    def step(closure: Any = None) -> Any:
        found = ladder.step(lambda: safe(closure), find_size())
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

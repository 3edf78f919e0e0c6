"""What the releases of Hugging Face's training loop do differently, and measuring a trainer's loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from brim.errors import InvalidInput
from brim.losses.form import LossForm, list_coefficients
from brim.losses.measure import measure_form
from brim.losses.rules import list_rules
from brim.losses.views import Parts
from brim.runtime.ranks import share_inputs

_NUM_SAMPLES = 4
_STEPS_PARTIAL_WINDOWS = (4, 47)
"""First release whose loop steps the last, partial window of a loader with a length. Source: transformers/trainer.py,
`do_sync_step`, 4.46.3 against 4.47.1."""


def steps_when_short(trainer: Any) -> bool:
    """Return whether the loop steps the optimizer after a last window with fewer micro-batches than the others."""
    loader = trainer.callback_handler.train_dataloader
    try:
        num_batches = len(loader)
    except TypeError:
        return False
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return version >= _STEPS_PARTIAL_WINDOWS or num_batches <= trainer.args.gradient_accumulation_steps


def measure_trainer(trainer: Any, batches: Sequence[Mapping[str, Any]]) -> LossForm:
    """Return what the loss of a trainer averages over, measured alike on every rank.

    Args:
        trainer: guarded; its own `compute_loss` makes the loss.
        batches: micro-batches of this rank; used where the dataset cannot be indexed.

    Raises:
        InvalidInput: the trainer splits rows over ranks. InseparableLoss: no count explains the loss.
    """
    _refuse_split_rows(trainer)
    parts = list(collate_parts(trainer))
    richest = max(batches, key=_count_targets, default=None)
    whole = parts[0].whole if parts else share_inputs(richest, trainer.args.device)
    if whole is None:
        raise InvalidInput("the first window of rank 0 has no micro-batch; nothing to measure the loss on")

    def loss_of(inputs: Mapping[str, Any]) -> Tensor:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(inputs)))

    coefficients = list_coefficients(trainer, getattr(trainer.model, "config", None))
    with _leaving_no_trace(trainer):
        return measure_form(loss_of, trainer.model, whole, parts=parts, coefficients=coefficients)


def _count_targets(inputs: Mapping[str, Any]) -> int:
    return max((int(rule.count(inputs)) for rule in list_rules(inputs)), default=0)


def _refuse_split_rows(trainer: Any) -> None:
    for kind in ("cp", "sp"):
        size = getattr(trainer, f"get_{kind}_size", lambda: 1)()
        if size > 1:
            raise InvalidInput(
                f"{kind} over {size} ranks splits each row, and guard cannot count a part; use exact=False"
            )


def collate_parts(trainer: Any) -> Iterator[Parts]:
    """Yield a few of the dataset's sequences, collated together and in two parts; none where it cannot be indexed."""
    handler = trainer.callback_handler
    loader = handler.eval_dataloader if handler.train_dataloader is None else handler.train_dataloader
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if collate is None or dataset is None or isinstance(dataset, torch.utils.data.IterableDataset) or len(dataset) < 2:
        return
    with torch.random.fork_rng(devices=[]):
        rows = [dataset[index] for index in range(min(_NUM_SAMPLES, len(dataset)))]
        for cut in dict.fromkeys((1, len(rows) // 2)):
            yield Parts(*(collate(copy.deepcopy(part)) for part in (rows, rows[:cut], rows[cut:])))


@contextmanager
def _leaving_no_trace(trainer: Any) -> Iterator[None]:
    """Put back the counters and metrics that a trainer keeps while it computes a loss."""
    kept = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if is_plain(value)}
    try:
        yield
    finally:
        vars(trainer).update(kept)


def is_plain(value: Any) -> bool:
    """Return whether a value is made of numbers, texts and containers of them alone."""
    if isinstance(value, Mapping):
        return all(is_plain(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_plain(part) for part in value)
    return isinstance(value, (bool, int, float, str))

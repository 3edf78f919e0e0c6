"""Lightning's automatic optimization as a subject."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from brim.checks.accumulation import Inputs, Split, Subject
from brim.checks.gradients import CaptureOptimizer
from brim.checks.loops import own_loss
from brim.checks.trainers import list_versions
from brim.errors import MissingExtra

FIX = "Trainer(..., callbacks=[brim.LightningExact()])"


def lightning_subject(
    model: nn.Module, rows: Sequence[Any], collate: Callable[[list[Any]], Inputs], *,
    exactly: Callable[[], Any] | None = None,
) -> Subject:  # fmt: skip
    """Return a LightningModule around a model as a subject.

    Args:
        model: small, on the CPU.
        rows: sequences. collate: makes a micro-batch of them.
        exactly: makes the callback that makes the loop exact, or None for the stock loop.

    Raises:
        MissingExtra: Lightning is not installed.
    """
    try:
        import lightning.pytorch as lightning
    except ModuleNotFoundError:
        raise MissingExtra(package="lightning", extra="dev", purpose="--trainer lightning") from None

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(model).train()

        def training_step(self, batch: Inputs, index: int) -> Tensor:
            return own_loss(self.model, batch)

        def configure_optimizers(self) -> CaptureOptimizer:
            return CaptureOptimizer(p for p in self.model.parameters() if p.requires_grad)

    def run(split: Split) -> list[Tensor]:
        module = Module()
        with _quietly():
            trainer = lightning.Trainer(
                accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=split.accumulation_steps,
                logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=tempfile.gettempdir(), callbacks=[] if exactly is None else [exactly()],
            )  # fmt: skip
            loader = torch.utils.data.DataLoader(list(rows), batch_size=split.micro_batch_size, collate_fn=collate)
            trainer.fit(module, loader)
        return trainer.optimizers[0].captured

    return Subject(
        name=f"{type(model).__name__} under Lightning", model=model, rows=rows, collate=collate, loss_of=own_loss,
        run=run, fix=FIX, versions=list_versions(),
    )  # fmt: skip


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep Lightning's own messages out of the report."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

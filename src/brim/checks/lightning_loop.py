"""Lightning's automatic optimization as a subject."""

from __future__ import annotations

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
from brim.checks.loops import own_loss, wrap
from brim.checks.small import copy_model
from brim.checks.trainers import list_versions, place_of
from brim.errors import MissingExtra

FIX = "Trainer(..., callbacks=[brim.LightningExact()])"


def lightning_subject(
    model: nn.Module, rows: Sequence[Any], collate: Callable[[list[Any]], Inputs], *,
    exactly: Callable[[], Any] | None = None, num_ranks: int = 1, sharding: str = "ddp",
) -> Subject:  # fmt: skip
    """Return a LightningModule around a model as a subject.

    Args:
        model: small, on the CPU.
        rows: sequences. collate: makes a micro-batch of them.
        exactly: makes the callback that makes the loop exact, or None for the stock loop.
        num_ranks: data-parallel ranks; this process is one of them and in their process group.
        sharding: ddp, or fsdp2 by Lightning's `ModelParallelStrategy`, where there are several ranks.

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
            self.model = copy_model(model).train()

        def configure_model(self) -> None:
            if num_ranks > 1 and sharding == "fsdp2":
                wrap(self.model, sharding)

        def training_step(self, batch: Inputs, index: int) -> Tensor:
            return own_loss(self.model, batch)

        def configure_optimizers(self) -> CaptureOptimizer:
            return CaptureOptimizer(p for p in self.model.parameters() if p.requires_grad)

    def run(split: Split) -> list[Tensor]:
        module = Module()
        with _quietly():
            trainer = lightning.Trainer(
                accelerator="cpu", devices=num_ranks, strategy=_make_strategy(num_ranks, sharding), max_epochs=1,
                accumulate_grad_batches=split.accumulation_steps, use_distributed_sampler=False,
                logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=tempfile.gettempdir(), callbacks=[] if exactly is None else [exactly()],
            )  # fmt: skip
            batches = deal(len(rows), split.micro_batch_size, num_ranks)
            trainer.fit(module, torch.utils.data.DataLoader(list(rows), batch_sampler=batches, collate_fn=collate))
        return trainer.optimizers[0].captured

    return Subject(
        name=f"{type(model).__name__} under Lightning{place_of(num_ranks, sharding)}", model=model, rows=rows,
        collate=collate, loss_of=own_loss, run=run, fix=FIX, num_ranks=num_ranks, versions=list_versions(),
    )  # fmt: skip


def _make_strategy(num_ranks: int, sharding: str) -> Any:
    from lightning.pytorch import strategies

    if num_ranks == 1:
        return "auto"
    if sharding == "fsdp2":
        return strategies.ModelParallelStrategy(data_parallel_size=num_ranks, tensor_parallel_size=1)
    return strategies.DDPStrategy(find_unused_parameters=True, process_group_backend="gloo")


def deal(num_rows: int, size: int, num_ranks: int) -> list[list[int]]:
    """Return the rows of each of this rank's micro-batches, dealt out one by one.

    Where the last round does not go round, the first micro-batches are dealt again, as Accelerate's loaders do: a rank
    that has fewer would leave the others waiting.
    """
    batches = [list(range(start, min(start + size, num_rows))) for start in range(0, num_rows, size)]
    lacking = -len(batches) % num_ranks
    rank = torch.distributed.get_rank() if num_ranks > 1 else 0
    return [*batches, *batches[:lacking]][rank::num_ranks]


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

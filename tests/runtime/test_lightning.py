"""Lightning with the callback takes the big batch's steps, and without it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtime_toys import (
    EXACT,
    Recorder,
    build_llama,
    build_mixtral,
    cut,
    differ,
    find_routed_truth,
    make_rows,
    stack,
    train_whole,
)
from torch.utils.data import DataLoader

from brim.errors import InseparableLoss, InvalidInput
from brim.runtime.lightning import LightningExact

lightning = pytest.importorskip("lightning.pytorch")

LENGTHS = (4, 12, 12, 5, 12, 3, 9, 7, 12, 4, 6)
SIZE, STEPS = 2, 3
WINDOWS = ((0, 6), (6, 11))
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "devices": 1,
}  # fmt: skip


class Job(lightning.LightningModule):
    """The usual module around a Hugging Face model."""

    def __init__(self, model: Any, *, as_dict: bool = False) -> None:
        super().__init__()
        self.model, self.as_dict, self.recorder = model, as_dict, Recorder(model)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, on_epoch=True)
        return {"loss": loss, "other": 1} if self.as_dict else loss

    def configure_optimizers(self) -> Any:
        return self.recorder


def run_fit(rows: Any, job: Job, *callbacks: Any, **settings: Any) -> list[Any]:
    """Return the gradient of each optimizer step."""
    trainer = lightning.Trainer(
        **QUIET, max_epochs=settings.pop("max_epochs", 1), accumulate_grad_batches=STEPS, callbacks=list(callbacks),
        **settings,
    )  # fmt: skip
    trainer.fit(job, DataLoader(rows, batch_size=SIZE, collate_fn=stack))
    assert "training_step" not in vars(job) and "log" not in vars(job)
    return job.recorder.seen


def find_truth(rows: Any, model: Any) -> list[Any]:
    return [train_whole(model, stack(rows[start:stop])) for start, stop in WINDOWS]


@pytest.mark.parametrize("unlabelled", [(), (2, 3), (6, 7, 8, 9, 10)])
def test_steps_are_those_of_the_big_batch(unlabelled: tuple[int, ...]) -> None:
    rows, model = make_rows(LENGTHS, unlabelled=unlabelled), build_llama()
    truth = find_truth(rows, model)
    seen = run_fit(rows, Job(model, as_dict=bool(unlabelled)), LightningExact(), max_epochs=2)
    assert [differ(found, expected) <= EXACT for found, expected in zip(seen, truth * 2, strict=True)] == [True] * 4


def test_stock_accumulation_is_off() -> None:
    rows, model = make_rows(LENGTHS), build_llama()
    truth = find_truth(rows, model)
    seen = run_fit(rows, Job(model))
    assert all(differ(found, expected) > 0.02 for found, expected in zip(seen, truth, strict=True))


def test_clipping_sees_the_true_gradient() -> None:
    rows, model = make_rows(LENGTHS), build_llama()
    truth = find_truth(rows, model)
    limit = float(min(one.norm() for one in truth)) / 2
    seen = run_fit(rows, Job(model), LightningExact(), gradient_clip_val=limit)
    for found, expected in zip(seen, truth, strict=True):
        assert differ(found, expected * limit / expected.norm()) <= EXACT


def test_auxiliary_losses_are_averaged_over_micro_batches() -> None:
    rows, model = make_rows(LENGTHS), build_mixtral()
    truth = [find_routed_truth(model, rows[start:stop], SIZE) for start, stop in WINDOWS]
    seen = run_fit(rows, Job(model), LightningExact())
    assert [differ(found, expected) <= EXACT for found, expected in zip(seen, truth, strict=True)] == [True] * 2
    assert not model._forward_hooks


def test_what_is_logged_stays_the_modules_own() -> None:
    rows, model = make_rows(LENGTHS), build_llama()
    job = Job(model)
    trainer = lightning.Trainer(**QUIET, max_epochs=1, accumulate_grad_batches=STEPS, callbacks=[LightningExact()])
    trainer.fit(job, DataLoader(rows, batch_size=SIZE, collate_fn=stack))
    means = [float(model(**batch).loss.detach()) for batch in cut(rows, SIZE)]
    sizes = [len(batch["labels"]) for batch in cut(rows, SIZE)]
    expected = sum(mean * size for mean, size in zip(means, sizes, strict=True)) / sum(sizes)
    assert float(trainer.callback_metrics["train_loss_epoch"]) == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_counted_is_refused() -> None:
    rows = make_rows(LENGTHS)
    job = Job(build_llama())
    job.automatic_optimization = False
    trainer = lightning.Trainer(**QUIET, max_epochs=1, callbacks=[LightningExact()])
    with pytest.raises(InvalidInput, match="automatic optimization"):
        trainer.fit(job, DataLoader(rows, batch_size=SIZE, collate_fn=stack))
    job = Job(build_llama())
    job.norm = torch.nn.BatchNorm1d(3)
    with pytest.raises(InseparableLoss, match="batch-norm"):
        run_fit(rows, job, LightningExact())
    assert "training_step" not in vars(job)

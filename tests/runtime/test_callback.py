"""A real Trainer on a CPU with a cap, watched: what it logs, says and leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from watch_toys import LENGTH, SIZES, plan_job, say_of

import brim
from brim.devices.capped import CappedMemory
from brim.planner.record import Plan
from brim.runtime.callback import find_watch
from brim.runtime.run_record import RUN_FILE, RunRecord, read_run
from brim.units import GIB

MEMORY_KEYS = {
    "memory/allocated_bytes", "memory/reserved_bytes", "memory/peak_allocated_bytes", "memory/peak_reserved_bytes",
    "memory/device_bytes",
}  # fmt: skip
SPEED_KEYS = {"speed/step_seconds", "speed/tokens_per_second", "speed/padding_fraction"}


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Forgetful(LlamaForCausalLM):
    """Takes the count of the whole window and does not use it, as hundreds of classes do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **{name: value for name, value in kwargs.items() if "num_items" not in name})


def make_rows(*lengths: int) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, SIZES["vocab_size"], (length,), generator=draw).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in rows]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], -100) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
    }


def make_trainer(
    folder: Path, rows: list[dict[str, list[int]]], *, kind: type[Trainer] = InOrder,
    model: type[LlamaForCausalLM] = LlamaForCausalLM, **options: Any,
) -> Trainer:  # fmt: skip
    torch.manual_seed(0)
    said = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, **options,
    }  # fmt: skip
    return kind(
        model(LlamaConfig(**SIZES)), TrainingArguments(str(folder), **said), train_dataset=rows, eval_dataset=rows[:4],
        data_collator=collate,
    )  # fmt: skip


@pytest.fixture
def capped() -> Iterator[CappedMemory]:
    with CappedMemory(GIB) as memory:
        yield memory


def read(folder: Path) -> RunRecord:
    path = folder / RUN_FILE
    return read_run(path.read_bytes(), path=str(path))


def run(
    folder: Path, plan: Plan | None, rows: list[Any], *, note: Any = None, exact: bool = True,
    recover: bool | None = None, **options: Any,
) -> Any:  # fmt: skip
    trainer = brim.guard(make_trainer(folder, rows, **options), plan, note=note, exact=exact, recover=recover)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Return the peak of a step at the planned length, as measured: the plan that is right."""
    folder = tmp_path_factory.mktemp("measured")
    with CappedMemory(GIB):
        run(folder, None, make_rows(*[LENGTH] * 12), exact=False)
    peak = read(folder).measured.peak_allocated_bytes
    assert peak is not None
    return peak


def test_a_plan_that_is_right(tmp_path: Path, capped: CappedMemory, measured: int, capsys: Any) -> None:
    notes: list[Any] = []
    trainer = run(tmp_path, say_of(plan_job(), measured), make_rows(*[LENGTH, 100] * 8), note=notes.append)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("brim:")]
    assert len(said) == 1 and said[0].startswith("brim: step 3: tensors peak at")
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 4 and all(row.keys() >= MEMORY_KEYS for row in logs)
    assert all(row.keys() >= SPEED_KEYS for row in logs[1:])  # the first step is left out
    assert all(isinstance(row[key], (int, float)) for row in logs for key in MEMORY_KEYS)
    (observation,) = notes
    record = read(tmp_path)
    assert record.observation == observation and record.verdicts == () and record.state == "ended"
    assert (observation.num_steps, observation.longest_tokens) == (4, LENGTH)
    assert observation.capacity_bytes == GIB and observation.device == "cpu" and observation.fits
    assert observation.peak_allocated_bytes == pytest.approx(measured, rel=0.03)
    assert dict(observation.versions)["torch"]
    assert record.measured.padding_fraction == pytest.approx(14 / LENGTH, abs=1e-3)


def test_a_plan_that_says_half(tmp_path: Path, capped: CappedMemory, measured: int, capsys: Any) -> None:
    run(tmp_path, say_of(plan_job(), measured // 2), make_rows(*[LENGTH] * 16))
    assert "warning: tensors peaked at" in capsys.readouterr().err
    (verdict,) = read(tmp_path).verdicts
    assert (verdict.code, verdict.step) == ("estimate_low", 2)
    assert verdict.facts["ratio"] == pytest.approx(2.0, abs=0.1)


def test_a_length_that_is_still_to_come(tmp_path: Path, capped: CappedMemory, measured: int) -> None:
    plan = say_of(plan_job(), measured, budget_bytes=round(1.3 * measured))
    run(tmp_path, plan, make_rows(*[LENGTH] * 15, 8 * LENGTH))
    early = next(one for one in read(tmp_path).verdicts if one.code == "peak_ahead")
    assert early.step == 2 and early.facts["coming_tokens"] == 8 * LENGTH  # two steps before it comes
    assert LENGTH <= early.facts["fitting_tokens"] < 8 * LENGTH
    truth = read(tmp_path).measured.peak_allocated_bytes
    assert truth is not None and early.facts["coming_peak_bytes"] > 1.3 * measured
    assert early.facts["coming_peak_bytes"] == pytest.approx(truth, rel=0.05)


def test_accumulation_and_evaluation_are_no_steps(tmp_path: Path, capped: CappedMemory, measured: int) -> None:
    options = {
        "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "num_train_epochs": 2,
        "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "logging_steps": 2,
    }  # fmt: skip
    trainer = run(tmp_path, say_of(plan_job(), measured), make_rows(*[LENGTH] * 14), **options)
    record = read(tmp_path)
    assert record.measured.num_steps == trainer.state.global_step == 8  # windows of 4, 4, 4 and 2, twice
    assert record.observation is not None and record.observation.strategy.gradient_accumulation_steps == 4
    assert record.measured.peak_allocated_bytes is not None and record.measured.peak_allocated_bytes < measured
    evaluated = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluated) == 8 and not any(key.startswith("memory/") for row in evaluated for key in row)
    assert [one.code for one in record.verdicts][:1] == ["split"]
    assert sum("loss" in row for row in trainer.state.log_history) == 4


def test_a_window_that_was_run_again_in_pieces(tmp_path: Path, capped: CappedMemory, measured: int) -> None:
    """A stand-in for recovery: from the third step on each micro-batch is run in pieces of one sequence."""

    class InPieces(InOrder):
        recovery = SimpleNamespace(size=None, events=[])

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 2 and not self.recovery.events:
                self.recovery.size = 1
                self.recovery.events.append("step 2: out of memory in backward; micro-batch 2 -> 1")
                kept = torch.zeros(3 * measured // 4)
                capped.num_ooms += 1
                del kept
            size = self.recovery.size or 2
            pieces = [{key: value[at : at + size] for key, value in inputs.items()} for at in range(0, 2, size)]
            return sum(super(InPieces, self).training_step(model, piece, *args, **kwargs) for piece in pieces)

    run(tmp_path, say_of(plan_job(), measured), make_rows(*[LENGTH] * 48), kind=InPieces, exact=False)
    record = read(tmp_path)
    assert [one.code for one in record.verdicts] == ["survived"] and record.verdicts[0].step == 3
    assert record.measured.num_ooms == 0 and record.observation is not None and record.observation.fits
    assert record.observation.strategy.micro_batch_size == 1
    assert record.measured.peak_allocated_bytes is not None and record.expected is not None
    assert record.measured.peak_allocated_bytes == pytest.approx(record.expected.as_run_allocated_bytes, rel=0.1)


def test_a_window_that_recovery_ran_again(tmp_path: Path, measured: int) -> None:
    """The real thing: one allocation is refused in the fourth step, and guard goes on in pieces of one sequence."""
    refused: list[int] = []
    trainer = make_trainer(tmp_path, make_rows(*[LENGTH] * 40))

    def refuse(number: int, num_bytes: int) -> bool:
        if trainer.state.global_step == 3 and num_bytes > 2**17 and not refused:
            refused.append(number)
            return True
        return False

    with CappedMemory(GIB, refuse=refuse):
        brim.guard(trainer, say_of(plan_job(), measured), history=False).train()
    record = read(tmp_path)
    assert len(trainer.recovery_events) == len(refused) == 1
    assert [(one.code, one.step) for one in record.verdicts] == [("survived", 4)]
    assert record.observation is not None and record.observation.fits and record.measured.num_ooms == 0
    assert record.observation.strategy.micro_batch_size == 1 and record.expected is not None
    assert record.measured.peak_allocated_bytes == pytest.approx(record.expected.as_run_allocated_bytes, rel=0.1)


def test_training_is_the_same(tmp_path: Path) -> None:
    rows = make_rows(*[40, 20, 30, 10] * 4)
    weights = []
    for watch in (True, False):
        trainer = brim.guard(make_trainer(tmp_path, rows), plan_job(), watch=watch)
        trainer.train()
        weights.append(torch.cat([one.detach().flatten() for one in trainer.model.parameters()]))
        keys = {key for row in trainer.state.log_history for key in row if "/" in key}
        assert keys == (SPEED_KEYS if watch else set())  # no cap: nothing counts memory
    assert torch.equal(*weights)


@pytest.mark.parametrize(("model", "found"), [(Forgetful, True), (LlamaForCausalLM, False)])
def test_a_loss_that_is_a_sum_is_seen_in_the_first_step(tmp_path: Path, model: Any, found: bool) -> None:
    rows = make_rows(*[40, 20, 30, 10] * 4)
    options = {"model": model, "gradient_accumulation_steps": 4, "remove_unused_columns": False}
    run(tmp_path, None, rows, exact=False, **options)
    codes = {one.code: one for one in read(tmp_path).verdicts}
    assert ("loss_scale" in codes) == found
    if found:
        assert codes["loss_scale"].facts["loss"] == pytest.approx(4 * codes["loss_scale"].facts["mean_loss"], rel=0.1)
        run(tmp_path, None, rows, **options)
        assert "loss_scale" not in {one.code for one in read(tmp_path).verdicts}  # guard makes it exact


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: Any) -> None:
    trainer = brim.guard(make_trainer(tmp_path / "out", make_rows(*[8] * 16)))
    (tmp_path / "out").rmdir() if (tmp_path / "out").exists() else None
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    trainer.train()
    assert trainer.state.global_step == 4
    assert capsys.readouterr().err.count("the run goes on without its record") == 1


def test_every_train_is_a_run(tmp_path: Path) -> None:
    notes: list[Any] = []
    trainer = run(tmp_path, plan_job(), make_rows(*[8] * 8), note=notes.append)
    trainer.train()
    assert [one.num_steps for one in notes] == [2, 2]
    brim.guard(trainer, plan_job(), note=notes.append)
    trainer.train()
    assert len(notes) == 3  # guarded twice, watched once


def test_unguard_takes_it_all_back(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_rows(*[8] * 8))
    before = set(vars(trainer))
    callbacks = len(trainer.callback_handler.callbacks)
    brim.guard(trainer)
    assert find_watch(trainer) is not None
    brim.unguard(trainer)
    assert set(vars(trainer)) == before and len(trainer.callback_handler.callbacks) == callbacks
    brim.guard(trainer, watch=False)
    assert find_watch(trainer) is None


def test_a_run_that_dies_leaves_its_record(tmp_path: Path, measured: int) -> None:
    notes: list[Any] = []
    plan = say_of(plan_job(), measured, budget_bytes=round(1.4 * measured))
    with CappedMemory(round(1.6 * measured)), pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, plan, make_rows(*[LENGTH] * 12, *[16 * LENGTH] * 4), note=notes.append, recover=False)
    record = read(tmp_path)
    assert (record.state, record.problem) == ("died", "out of memory")
    assert [one.fits for one in notes] == [False] and notes[0].num_steps == 3
    found = [(one.code, one.severity, one.step) for one in record.verdicts]
    assert found == [("peak_ahead", "danger", 2), ("out_of_memory", "danger", 3)]  # said before it happened


def test_loggers_of_the_user_have_the_keys(tmp_path: Path, capped: CappedMemory) -> None:
    seen: list[dict[str, Any]] = []

    class Logger(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    trainer = make_trainer(tmp_path, make_rows(*[LENGTH] * 8), logging_steps=2)
    trainer.add_callback(Logger)
    brim.guard(trainer, replace(plan_job(), budget_bytes=GIB)).train()
    assert len(seen) == 2  # one of two steps, one at the end: as many as without
    assert seen[0].keys() >= MEMORY_KEYS and "train_loss" in seen[1] and not MEMORY_KEYS & seen[1].keys()

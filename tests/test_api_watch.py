"""Watched runs in the history, and read back from their record: through the verbs, end to end."""

from __future__ import annotations

import json
import os
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

torch = pytest.importorskip("torch")

import brim  # noqa: E402
from brim import api  # noqa: E402
from brim.devices.capped import CappedMemory  # noqa: E402
from brim.errors import InvalidFile  # noqa: E402
from brim.runtime.run_record import RUN_FILE  # noqa: E402
from brim.units import GIB  # noqa: E402

SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of the store; it is not there yet."""
    monkeypatch.setenv("BRIM_HISTORY", str(tmp_path / "data" / "history.sqlite"))
    return tmp_path / "data" / "history.sqlite"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> brim.Plan:
    folder = tmp_path_factory.mktemp("model")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", **SIZES}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return brim.plan(
        str(folder), gpu="1GiB", micro_batch_size=4, effective_batch_size=4, seq_len=64, method="full",
        trainer="plain", dtype="fp32", activation_checkpointing="none", history=False,
    )  # fmt: skip


def run(plan: brim.Plan, *, rows: int = 4, steps: int = 3, **said: Any) -> tuple[Any, list[str]]:
    """Train a real model in a plain loop on a capped CPU, watched; return the observation and what was said."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    lines: list[str] = []
    with CappedMemory(GIB):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
        optimizer = torch.optim.AdamW(model.parameters())
        tokens = torch.randint(3, 500, (rows, plan.workload.data.seq_len))
        loader = [{"input_ids": tokens, "labels": tokens}] * steps
        with brim.watch(plan, tell=lines.append, **said) as w:
            for batch in w.steps(loader):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return w.observation, lines


def pretend(plan: brim.Plan, steps: int = 3, **said: Any) -> tuple[Any, list[str]]:
    """Watch a loop that trains nothing; return the observation and what was said."""
    lines: list[str] = []
    with brim.watch(plan, tell=lines.append, **said) as w:
        for _ in range(steps):
            w.step(inputs={"input_ids": torch.ones(4, 64)})
    return w.observation, lines


def test_a_run_is_noted_with_what_calibration_needs(plan: brim.Plan) -> None:
    observation, lines = run(plan)
    (noted,) = api.list_observations()
    assert (noted.kind, noted.device, noted.num_steps, noted.fits) == ("watch", "cpu", 3, True)
    assert noted.peak_allocated_bytes == observation.peak_allocated_bytes and noted.longest_tokens == 64
    assert noted.step_seconds and noted.tokens_per_second
    assert dict(noted.versions)["torch"].startswith(".".join(torch.__version__.split(".")[:2]))
    assert noted.workload.cluster.device.name == "cpu"
    assert noted.predicted is not None and noted.predicted.source == "formula"
    assert not any("history" in line for line in lines)


def test_three_different_runs_correct_the_formula(plan: brim.Plan) -> None:
    for size in (2, 4, 8):
        split = replace(plan.strategy, micro_batch_size=size)
        batch = replace(plan.workload.batch, sequences=size)
        run(replace(plan, strategy=split, workload=replace(plan.workload, batch=batch)), rows=size)
    (calibration,) = api.list_calibrations(api.list_observations())
    assert (calibration.device, calibration.model_type, calibration.allocated.num_different) == ("cpu", "llama", 3)
    assert calibration.allocated.factor == pytest.approx(1.0, abs=0.1)  # without the workspaces that a CPU has not


@pytest.mark.parametrize("how", ["variable", "keyword"])
def test_history_can_be_off(plan: brim.Plan, store: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[Any] = []
    if how == "variable":
        monkeypatch.setenv("BRIM_HISTORY", "off")
    observation, _ = pretend(plan, history=None if how == "variable" else False, note=notes.append)
    assert notes == [observation] and not store.exists()


def test_a_run_without_a_plan_is_not_noted(plan: brim.Plan, store: Path) -> None:
    with brim.watch(tell=lambda line: None) as w:
        w.step()
    assert w.observation is None and not store.exists()


def _close(store: Path) -> None:
    store.parent.mkdir(mode=0o500)


def _fill(store: Path) -> None:
    store.parent.write_text("a file, no folder", encoding="utf-8")


def _forbid(store: Path) -> None:
    os.environ["BRIM_HISTORY"] = "/proc/brim/history.sqlite"  # where not even root may make a folder


def _damage(store: Path) -> None:
    store.parent.mkdir()
    store.write_bytes(b"hello" * 1000)


@pytest.mark.parametrize("spoil", [
    pytest.param(_close, marks=pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")), _fill, _damage,
    pytest.param(_forbid, marks=pytest.mark.skipif(not os.path.exists("/proc/self"), reason="no such file system")),
])  # fmt: skip
def test_a_history_that_cannot_be_written_is_one_line(plan: brim.Plan, store: Path, spoil: Any) -> None:
    spoil(store)
    observation, lines = pretend(plan)
    assert observation.num_steps == 3
    said = [line for line in lines if "was not noted in the history" in line]
    assert len(said) == 1 and said[0].startswith("brim: warning: ") and said[0].isprintable()


def test_a_full_disk_is_one_line(plan: brim.Plan, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("brim.history.store.migrate", refuse)
    _, lines = pretend(plan)
    assert sum("disk is full" in line for line in lines) == 1


def test_a_store_that_is_held_is_one_line(plan: brim.Plan, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(plan)
    monkeypatch.setattr("brim.history.store.BUSY_SECONDS", 0.2)
    holder = sqlite3.connect(store, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        observation, lines = pretend(plan, steps=4)
    finally:
        holder.close()
    assert observation.num_steps == 4 and sum("is held by another program" in line for line in lines) == 1
    assert len(api.list_observations()) == 1


def test_a_run_that_dies_of_something_else_had_room(plan: brim.Plan) -> None:
    for error in (KeyError("a"), torch.OutOfMemoryError("no")):
        with pytest.raises(type(error)), brim.watch(plan, tell=lambda line: None) as w:
            w.step()
            raise error
    assert sorted((one.fits, one.problem) for one in api.list_observations()) == [(False, "out of memory"), (True, "")]


def test_a_record_is_read_back(plan: brim.Plan, tmp_path: Path) -> None:
    observation, _ = pretend(plan, folder=str(tmp_path / "out"))
    record = brim.load_run(tmp_path / "out")
    assert record == brim.load_run(tmp_path / "out" / RUN_FILE)
    assert record.state == "ended" and record.observation == observation
    document = json.loads((tmp_path / "out" / RUN_FILE).read_text())
    jsonschema.Draft202012Validator.check_schema(brim.schema("run"))
    jsonschema.Draft202012Validator(brim.schema("run")).validate(document)
    assert set(document) == set(brim.schema("run")["properties"])


def test_what_is_no_record_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / RUN_FILE
    good = '{"schema_version": 1, "state": "ended", "measured": {"num_steps": 7, "device": "cpu"}}'
    path.write_text(good)
    assert brim.load_run(path).measured.num_steps == 7
    for text, said in (
        ("", "is no JSON"), ("[]", "is no watched run: not a JSON object"), ("{}", "it has no schema_version"),
        (good.replace(": 1,", ": 2,"), "has schema version 2, this brim reads up to 1"),
        (good.replace(": 1,", ": true,"), "it has no schema_version"), (good[:-9], "is no JSON"),
        (good.replace("ended", "walking"), "state: "), (good.replace("7", '"7"'), "measured.num_steps: "),
        (good.replace("7", "-7"), "num_steps is below zero"), (good.replace("7", "1e400"), "a number beyond 2**80"),
        (good.replace("7", "NaN"), "NaN is no number"), (good.replace("cpu", "\\u001b[31m"), "unprintable text"),
        (good.replace("cpu", 'cpu", "more": "x'), "measured.more: "), ("[" * 100_000, "is no JSON"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(InvalidFile) as refused:
            brim.load_run(path)
        assert said in str(refused.value) and "\n" not in str(refused.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidFile, match="not UTF-8 text"):
        brim.load_run(path)
    for missing in (tmp_path / "none.json", tmp_path / "nothing" / RUN_FILE):
        with pytest.raises(InvalidFile, match="No such file or directory"):
            brim.load_run(missing)

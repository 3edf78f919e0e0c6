"""`brim history`: what it prints, writes, takes in and deletes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from brim import api
from brim.cost.estimate import estimate
from brim.spec.observation import Observation, Prediction

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of the store; it is not there yet."""
    monkeypatch.setenv("BRIM_HISTORY", str(tmp_path / "history.sqlite"))
    return tmp_path / "history.sqlite"


@pytest.fixture
def noted() -> None:
    """Note four runs: three that fitted, one that did not."""
    plan = api.plan("8B", gpu="rtx-4090", method="qlora", history=False)
    for day, micro in enumerate((1, 2, 4, 8), start=1):
        strategy = replace(plan.strategy, micro_batch_size=micro, gradient_accumulation_steps=32 // micro)
        answer = estimate(plan.workload, strategy)
        assert answer.step_time is not None
        fits, seconds = micro < 8, answer.step_time.step_seconds
        said = Prediction(
            source="formula", peak_allocated_bytes=answer.peak_allocated_bytes, step_seconds=seconds,
            peak_reserved_bytes=answer.peak_reserved_bytes, device_bytes=answer.device_bytes,
        )  # fmt: skip
        run = Observation(
            kind="trial", workload=plan.workload, strategy=strategy, finished=f"2026-03-0{day}T12:00:00Z",
            device="NVIDIA GeForce RTX 4090", capacity_bytes=plan.workload.cluster.device.capacity_bytes, num_steps=2,
            fits=fits, problem="" if fits else "CUDA out of memory", versions=(("torch", "2.6.0"),), predicted=said,
            peak_allocated_bytes=round(answer.peak_allocated_bytes * 1.25) if fits else None,
            step_seconds=seconds * 2 if fits else None,
        )  # fmt: skip
        assert api.add_observation(run) is None


def test_an_empty_history_says_where_runs_come_from(brim: Run) -> None:
    assert brim("history").out == "No measured runs yet: `brim trial` and watched runs land here.\n"
    assert brim("history", "--json").json == {"runs": [], "calibrations": []}


def test_runs_stand_beside_what_was_said(brim: Run, noted: None) -> None:
    text = brim("history").out
    rows = [line for line in text.splitlines() if line.startswith("2026-")]
    assert [row[:10] for row in rows] == ["2026-03-04", "2026-03-03", "2026-03-02", "2026-03-01"]
    assert all("rtx-4090" in row for row in rows) and "Llama-3.1-8B" in text
    assert "(-20 %)" in rows[3] and "(-50 %)" in rows[3] and rows[3].endswith("fits")
    assert rows[0].endswith("out of memory")
    words = " ".join(text.split())
    assert "peak calibrated on 3 runs of llama models on rtx-4090 (torch 2.6, trl): measured was 1.250 x" in words
    assert "held-out error median 0.0%, worst 0.0%; measured was 2.000 x the formula's" in words


def test_json_has_runs_and_what_they_teach(brim: Run, noted: None) -> None:
    document = brim("history", "--json").json
    assert len(document["runs"]) == 4 == len({run["id"] for run in document["runs"]})
    assert document["runs"][0]["schema_version"] == 1 and document["runs"][0]["kind"] == "trial"
    assert document["calibrations"][0]["allocated"]["num_runs"] == 3


def test_runs_go_out_and_come_in(brim: Run, noted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "runs.jsonl")
    assert brim("history", "export", path).out == f"wrote {path}: 4 runs\n"
    assert brim("history", "import", path).out == "0 runs imported, 4 known already\n"
    monkeypatch.setenv("BRIM_HISTORY", str(tmp_path / "other.sqlite"))
    assert brim("history", "import", path, "--json").json == {"imported": 4, "known": 0, "file": path}
    assert brim("history", "export", path, "--json").json == {"exported": 4, "file": path}
    Path(path).write_text("{}\n")
    refused = brim("history", "import", path)
    assert refused.code == 2 and refused.err.startswith("error: ") and "line 1: is no run" in refused.err
    error = brim("history", "import", path, "--json").json["error"]
    assert error["type"] == "InvalidFile" and "line 1" in error["message"]


def test_a_plan_shows_its_runs(brim: Run, job: tuple[str, ...], noted: None) -> None:
    words = " ".join(brim("plan", *job).out.split())
    assert "formula, calibrated on 3 measured runs of rtx-4090; held-out error of its allocated peak:" in words
    assert "formula, calibrated on 3 runs of this card, held-out error" in words and "unmeasured" not in words
    bare = brim("plan", *job, "--no-history").out
    assert "calibrated" not in bare and bare.rstrip().endswith("--no-history --export trl")
    shown = " ".join(brim("estimate", *job).out.split())
    assert "calibrated on 3 measured runs" in shown
    assert brim("estimate", *job, "--json").json["estimates"][0]["calibration"]["allocated"]["num_runs"] == 3


def test_only_what_was_named_is_forgotten(brim: Run, noted: None) -> None:
    assert brim("history", "forget", "--gpu", "h100", "--yes").out == "0 runs forgotten\n"
    assert brim("history", "forget", "--before", "2026-03-02", "--yes").out == "1 run forgotten\n"
    assert brim("history", "forget", "--model", "8B", "--gpu", "rtx-4090", "--yes", "--json").json == {"forgotten": 3}
    assert brim("history", "forget", "--all", "--yes").out == "0 runs forgotten\n"


@pytest.mark.parametrize(("words", "said"), [
    (("forget",), "say which runs: --all, or any of --gpu, --model and --before"),
    (("forget", "--all", "--gpu", "h100"), "say which runs: --all"),
    (("forget", "--all"), "4 runs would be forgotten for good; add --yes"),
    (("forget", "--before", "soon", "--yes"), "a day is written 2026-01-31, not 'soon'"),
    (("export",), "name a file: `brim history export runs.jsonl`"),
    (("delete",), "unknown action 'delete'; known: export, forget, import"),
    (("import", "none.jsonl"), "cannot be read: No such file or directory"),
    (("export", "none/runs.jsonl"), "cannot be written: No such file or directory"),
])  # fmt: skip
def test_what_cannot_be_meant_is_one_line(brim: Run, noted: None, words: tuple[str, ...], said: str) -> None:
    done = brim("history", *words)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1
    assert len(api.list_observations()) == 4


@pytest.mark.parametrize(("answer", "left", "code"), [("y\n", 0, 0), ("n\n", 4, 130)])
def test_somebody_who_is_there_is_asked(
    brim: Run, noted: None, monkeypatch: pytest.MonkeyPatch, answer: str, left: int, code: int
) -> None:
    there = io.StringIO(answer)
    monkeypatch.setattr(there, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", there)
    done = brim("history", "forget", "--all")
    assert done.code == code and "Forget 4 runs for good?" in done.out + done.err
    assert len(api.list_observations()) == left


def test_switched_off_is_said(brim: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIM_HISTORY", "off")
    done = brim("history")
    assert done.code == 2 and "history is switched off: BRIM_HISTORY=off" in done.err


def test_a_long_history_shows_its_newest(brim: Run, noted: None) -> None:
    (newest,) = api.list_observations(limit=1)
    for number in range(50):
        api.add_observation(replace(newest, num_steps=100 + number))
    text = brim("history").out
    assert "the newest 40 of 54 runs (--json has all)" in text
    assert len([line for line in text.splitlines() if line.startswith("2026-")]) == 40
    assert len(brim("history", "--json").json["runs"]) == 54


def test_a_damaged_store_is_one_line(brim: Run, store: Path) -> None:
    store.write_bytes(b"hello" * 1000)
    done = brim("history")
    assert done.code == 2 and "is damaged" in done.err and "move it away" in done.err
    assert json.loads(brim("history", "--json").out)["error"]["type"] == "InvalidFile"

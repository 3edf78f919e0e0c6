"""Measured runs correct the formula: through the verbs, end to end."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import brim
from brim import api
from brim.api import measured
from brim.cost.estimate import estimate
from brim.spec.observation import Observation

JOB = {"model": "8B", "gpu": "rtx-4090", "method": "qlora", "seq_len": 1024}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of the store; it is not there yet."""
    monkeypatch.setenv("BRIM_HISTORY", str(tmp_path / "history.sqlite"))
    monkeypatch.setattr(measured, "_read_installed_torch", lambda: "2.6")
    return tmp_path / "history.sqlite"


def note(factor: float, *micros: int, torch: str = "2.6.0", **said: Any) -> None:
    """Note runs of the job whose peak and time are the formula's times a factor."""
    plan = brim.plan(**JOB, history=False)
    for micro in micros:
        strategy = replace(
            plan.strategy, micro_batch_size=micro, gradient_accumulation_steps=32 // micro,
            activation_checkpointing="full",
        )  # fmt: skip
        answer = estimate(plan.workload, strategy)
        assert answer.step_time is not None
        facts: dict[str, Any] = {
            "kind": "trial", "workload": plan.workload, "strategy": strategy, "finished": "2026-03-01T12:00:00Z",
            "device": "NVIDIA GeForce RTX 4090", "capacity_bytes": plan.workload.cluster.device.capacity_bytes,
            "num_steps": 2, "fits": True, "versions": (("torch", torch),),
            "peak_allocated_bytes": round(answer.peak_allocated_bytes * factor),
            "step_seconds": answer.step_time.step_seconds * factor,
        }  # fmt: skip
        assert api.add_observation(Observation(**(facts | said))) is None


def test_a_plan_follows_the_runs_of_its_card() -> None:
    before = brim.plan(**JOB)
    note(1.6, 1, 2, 4)
    after = brim.plan(**JOB)
    assert after.estimate.calibration is not None
    assert after.estimate.calibration.allocated.factor == pytest.approx(1.6, rel=1e-3)
    assert after.strategy.micro_batch_size < before.strategy.micro_batch_size
    assert after.effective_batch_size == before.effective_batch_size
    assert any("on 3 runs of llama models on rtx-4090 (torch 2.6, trl)" in reason for reason in after.reasons)
    assert after.estimate.peak_allocated_bytes <= after.budget_bytes
    assert brim.plan(**JOB) == after, "the same input and the same history, the same plan"
    assert brim.plan(**JOB, history=False) == before
    assert brim.load_plan(save(after)) == after


def save(plan: brim.Plan) -> Path:
    path = Path(os.environ["BRIM_HISTORY"]).with_name("plan.json")
    brim.save_plan(plan, path)
    return path


def test_an_estimate_follows_too_and_the_rule_does_not() -> None:
    bare = brim.estimate(**JOB, by=("rule", "formula"))
    note(1.25, 1, 2, 4)
    rule, formula = brim.estimate(**JOB, by=("rule", "formula"))
    assert rule == bare[0]
    assert formula.peak_allocated_bytes == pytest.approx(1.25 * bare[1].peak_allocated_bytes, rel=1e-6)
    assert brim.estimate(**JOB, by=("rule", "formula"), history=False) == bare


@pytest.mark.parametrize("other", [
    {"gpu": "h100"}, {"trainer": "plain"}, {"model": "Qwen/Qwen3-8B"}, {"gpu": "24GiB"},
])  # fmt: skip
def test_runs_of_anything_else_say_nothing(other: dict[str, str]) -> None:
    note(1.25, 1, 2, 4)
    assert brim.plan(**(JOB | other)) == brim.plan(**(JOB | other), history=False)


def test_two_runs_are_not_enough() -> None:
    note(1.25, 1, 2)
    assert brim.plan(**JOB).estimate.calibration is None


def test_a_run_under_a_calibrated_plan_does_not_undo_it() -> None:
    """What was said of later runs had been corrected; the factor stays that of the formula."""
    note(1.25, 1, 2, 4)
    first = brim.plan(**JOB).estimate.calibration
    corrected = brim.estimate(**JOB, micro_batch_size=8)[0]
    note(1.25, 8, 16)
    second = brim.plan(**JOB).estimate.calibration
    assert first is not None and second is not None and corrected.calibration == first
    assert second.allocated.num_runs == 5
    assert second.allocated.factor == pytest.approx(first.allocated.factor, rel=1e-6)


def test_the_installed_torch_decides_then_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    note(1.5, 1, 2, 4, torch="2.9.1+cu128")
    note(1.3, 1, 2, 4, torch="2.10.0")
    note(1.2, 1, 2, torch="2.6.0")

    def find() -> str:
        calibration = brim.plan(**JOB).estimate.calibration
        return calibration.torch if calibration else ""

    assert find() == "2.10", "2.6 is installed and has too few; the card is not known to be here"
    note(1.2, 8, torch="2.6.1")
    assert find() == "2.6"
    monkeypatch.setattr(measured, "_read_installed_torch", lambda: "")
    assert find() == "2.10"
    workload = brim.plan(**JOB).workload
    here = replace(workload.cluster.device, free_bytes=workload.cluster.device.capacity_bytes)
    local = replace(workload, cluster=replace(workload.cluster, device=here))
    monkeypatch.setattr(measured, "_read_installed_torch", lambda: "2.8")
    assert measured.find_calibration(local) is None, "on this card under this torch nothing was measured"


def test_a_broken_history_stops_no_plan(store: Path) -> None:
    store.write_bytes(b"hello" * 1000)
    plan = brim.plan(**JOB)
    assert any(said.startswith("measured runs were not used: ") and "is damaged" in said for said in plan.assumptions)
    assert plan.strategy == brim.plan(**JOB, history=False).strategy
    assert any("is damaged" in note for note in brim.estimate(**JOB)[0].notes)


def test_the_installed_torch_is_read_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch = pytest.importorskip("torch")
    assert measured._read_installed_torch() == ".".join(torch.__version__.split(".")[:2])


def test_what_a_store_teaches_is_listed() -> None:
    note(1.25, 1, 2, 4)
    note(1.5, 1, 2, 4, torch="2.9.1+cu128")
    note(1.5, 1, 2, 4, versions=())
    found = api.list_calibrations(api.list_observations())
    assert [(one.torch, round(one.allocated.factor, 3)) for one in found] == [("2.6", 1.25), ("2.9", 1.5)]


LIGHT = """
import sys, brim
brim.plan("8B", gpu="rtx-4090", method="qlora")
print(sorted({"sqlite3", "pydantic", "torch", "importlib.metadata"} & set(sys.modules)))
"""


@pytest.mark.parametrize(("runs", "loaded"), [((), "[]"), ((1, 2, 4), "['sqlite3']")])
def test_planning_stays_light(runs: tuple[int, ...], loaded: str) -> None:
    """Without a store SQLite is not loaded; with one, pydantic is not."""
    if runs:
        note(1.1, *runs)
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == loaded

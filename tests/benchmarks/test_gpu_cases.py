"""Cases to measure: every one is a question brim can answer; and the script that measures really runs, on the CPU."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from accuracy import predict
from rows import HIDDEN_FROM_PREDICTOR, read_row

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
TRUTH = GPU.parent / "truth" / "memory.jsonl"
CASES = [json.loads(line) for line in (GPU / "cases.jsonl").read_text(encoding="utf-8").splitlines()]
MEASURE = GPU / "measure.py"


def load(name: str) -> ModuleType:
    """Return a script of the folder as a module."""
    spec = importlib.util.spec_from_file_location(name, GPU / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    """Return the measuring script as a module."""
    return load("measure")


def make_outcome(**changes: Any) -> dict[str, Any]:
    values = {
        "allocated": 10**9, "reserved": 11 * 10**8, "device": 15 * 10**8, "micro_batch_seconds": 0.5,
        "fixed_seconds": 0.25, "step_seconds": 0.75, "gpu": "NVIDIA A100-SXM4-80GB", "memory_bytes": 85 * 10**9,
        "version": "torch 2.13.0",
    }  # fmt: skip
    return {**values, **changes}


def test_there_are_enough_cases_of_every_kind() -> None:
    assert len(CASES) >= 40
    assert len({case["id"] for case in CASES}) == len(CASES)
    assert {case["method"] for case in CASES} == {"full", "lora", "qlora"}
    assert {case["gpu"]["memory_bytes"] // 10**9 for case in CASES} == {8, 16, 24, 40, 80}
    assert {case["activation_checkpointing"] for case in CASES} == {"none", "full"}
    assert {1, 4} == {case["gradient_accumulation_steps"] for case in CASES}
    lengths = [case["seq_len"] for case in CASES]
    assert (min(lengths), max(lengths)) == (512, 32768)
    sizes = [case["model"]["params"] for case in CASES]
    assert min(sizes) < 0.15e9 and max(sizes) > 70e9
    out = [case for case in CASES if case["notes"].endswith("runs out of memory")]
    assert 5 <= len(out) <= len(CASES) // 3


def test_every_case_is_a_question_with_an_answer() -> None:
    """(Workload, Strategy) come out, with what the case says, and the formula answers."""
    for case in CASES:
        workload, strategy = read_row({key: value for key, value in case.items() if key not in HIDDEN_FROM_PREDICTOR})
        assert workload.recipe.method == case["method"]
        assert workload.model.name == case["model"]["name"]
        assert workload.cluster.device.capacity_bytes == case["gpu"]["memory_bytes"]
        assert strategy.micro_batch_size == case["micro_batch_size"]
        assert workload.recipe.engine.name.startswith("plain") and not workload.recipe.engine.logits_alive_in_backward
        assert predict(case, "formula")["peak_allocated_bytes"] > 0


def test_cases_and_rows_have_the_schema_of_the_truth_files(measure: ModuleType) -> None:
    first = json.loads(TRUTH.read_text(encoding="utf-8").splitlines()[0])
    for case in CASES:
        assert list(case) == list(first)
    rows = measure.make_rows(CASES[0], make_outcome())
    assert [row["id"].partition("#")[2] for row in rows] == ["allocated", "reserved", "device"]
    for row in rows:
        assert list(row) == list(first)
        assert row["measured"]["meter"] == row["id"].partition("#")[2]
        assert row["measured"]["low_bytes"] == row["measured"]["high_bytes"] > 0
        assert predict(row, "formula")["device_bytes"] > 0
    assert sum(row["weight"] for row in rows) == pytest.approx(CASES[0]["weight"])
    assert rows[0]["tokens_per_second"]["low"] == pytest.approx(8 * 512 / 0.75)


def test_out_of_memory_is_a_row_of_its_own(measure: ModuleType) -> None:
    (row,) = measure.make_rows(CASES[0], {"oom": True, "gpu": "G", "memory_bytes": 1, "version": "v"})
    assert row["tier"] == "oom" and row["measured"] == {"oom": True}
    assert row["gpu"] == {"name": "G", "memory_bytes": CASES[0]["gpu"]["memory_bytes"]}


def test_the_committed_cases_are_what_the_script_writes() -> None:
    cases = load("make_cases")
    made = [{**case, "notes": None} for case in cases.make_cases()]
    assert made == [{**case, "notes": None} for case in CASES]
    configs = json.loads((GPU / "configs.json").read_text(encoding="utf-8"))
    assert cases.list_configs() == configs
    assert {case["model"]["name"] for case in CASES} <= configs.keys()


def test_the_measuring_script_imports_nothing_of_brim() -> None:
    """It may be copied to a machine where brim is not."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MEASURE.read_text(encoding="utf-8"))):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
    ours = {"brim", "rows", "accuracy", "tiny_models", "make_cases", "real_steps"}
    assert not {name.split(".")[0] for name in names} & ours


def make_tiny(**changes: Any) -> dict[str, Any]:
    """Return a case of a model small enough for any machine."""
    case = {**CASES[0], "id": "gpu/tiny", "seq_len": 32, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    return {**case, "model": {**case["model"], "name": "tiny", "vocab_size": 512}, **changes}


def run(folder: Path, cases: list[dict[str, Any]], *words: str) -> subprocess.CompletedProcess[str]:
    path = folder / "cases.jsonl"
    path.write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    command = [sys.executable, str(MEASURE), "--cases", str(path), "--out", str(folder / "rows.jsonl"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_tiny_case_is_really_measured_and_a_broken_one_costs_only_itself(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    broken = make_tiny(id="gpu/broken", attention="no such kernel")
    done = run(tmp_path, [broken, make_tiny()], "--device", "cpu")
    assert done.returncode == 1, done.stdout + done.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["id"] == "gpu/tiny#unspecified" and row["tier"] == "weak" and row["gpu"]["name"] is None
    assert row["measured"]["low_bytes"] > 2**20 and row["measured"]["step_seconds"] > 0
    assert "torch" in row["framework"]["version"] and "no GPU" in row["notes"]
    (failure,) = [json.loads(line) for line in (tmp_path / "rows.failed.jsonl").read_text().splitlines()]
    assert failure["id"] == "gpu/broken" and "no such kernel" in failure["failed"]
    again = run(tmp_path, [broken, make_tiny()], "--device", "cpu")  # resumed: nothing is left to do
    assert again.returncode == 0 and again.stdout.count("done") == 2


def test_a_case_that_hangs_is_ended(measure: ModuleType) -> None:
    outcome = measure.run_alone(make_tiny(), "cpu", 0.05)
    assert outcome == {"failed": "no answer within 0.05 s"}


def test_a_dry_run_says_what_would_run_and_runs_nothing(tmp_path: Path, measure: ModuleType) -> None:
    done = run(tmp_path, [make_tiny()], "--dry-run", "--capacity", "12")
    assert done.returncode == 0 and "gpu/tiny/on-12gb: would run" in done.stdout
    assert not (tmp_path / "rows.jsonl").exists()
    assert "needs a card of 80 GB" in measure.find_obstacle(make_tiny(gpu={"memory_bytes": 80 * 10**9}), 24 * 10**9)
    assert measure.find_obstacle(make_tiny(), None) is None


def test_a_line_cut_short_does_not_spoil_the_next(tmp_path: Path, measure: ModuleType) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b', encoding="utf-8")
    measure.append_lines(path, [{"id": "c"}])
    assert [row["id"] for row in measure.read_lines(path)] == ["a", "c"]

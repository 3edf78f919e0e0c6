"""The trial end to end on a CPU held to a size: one strategy, the climb, what is shown, what is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_job import JOB, make_plan, write_model, write_script

import brim
from brim.cli.app import main
from brim.errors import DoesNotFit, InvalidInput, ProbeFailed
from brim.trials.record import Point, Trial, find_frontier

CAPACITY = "3MiB"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def climbed(model: str) -> Iterator[Trial]:
    yield brim.trial(model, device=f"cpu:{CAPACITY}", **JOB)


def test_the_climb_ends_at_what_fits_and_keeps_the_batch(climbed: Trial) -> None:
    assert climbed.best is not None and climbed.plan is not None
    assert 1 < len(climbed.runs) <= 12 and climbed.num_ooms <= 1
    for run in climbed.runs:
        assert run.strategy.micro_batch_size * run.strategy.gradient_accumulation_steps == 8
    fitting = [run for run in climbed.runs if run.fits]
    assert climbed.best.tokens_per_second == max(run.tokens_per_second or 0 for run in fitting)
    assert (climbed.best.peak_allocated_bytes or 0) <= climbed.budget_bytes
    assert climbed.plan.estimate.source == "trial" and climbed.plan.strategy == climbed.best.strategy
    assert climbed.plan.estimate.peak_allocated_bytes == climbed.best.peak_allocated_bytes


def test_memory_against_speed_has_every_candidate(climbed: Trial) -> None:
    measured = {point.strategy for point in climbed.points if point.measured}
    assert measured == {run.strategy for run in climbed.runs if run.peak_allocated_bytes is not None}
    assert len(climbed.points) > len(measured)
    speeds = [point.tokens_per_second for point in climbed.frontier]
    assert speeds == sorted(speeds) and len(set(speeds)) == len(speeds)


def test_the_frontier_has_no_point_that_another_beats() -> None:
    strategy = brim.Strategy(micro_batch_size=1, gradient_accumulation_steps=8)
    places = ((1, 10.0, True), (2, 5.0, True), (2, 20.0, True), (3, 30.0, False), (4, 20.0, True), (5, 25.0, True))
    points = [
        Point(strategy=strategy, peak_bytes=size, tokens_per_second=speed, measured=True, fits=fits)
        for size, speed, fits in places
    ]
    assert [(one.peak_bytes, one.tokens_per_second) for one in find_frontier(points)] == [(1, 10), (2, 20), (5, 25)]


def test_a_trial_is_shown_as_text_json_and_page(climbed: Trial) -> None:
    from rich.console import Console

    from brim.api import describe_trial
    from brim.report.trial import describe_run, format_trial, trial_page

    console = Console(width=100, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(format_trial(climbed, next_commands=["brim export plan.json transformers"]))
    text = console.export_text()
    assert text.startswith("Fits, measured: micro-batch") and "Memory against speed" in text and "chosen" in text
    assert text.count("\n  │") >= 12 or text.count("\n  |") >= 12
    page = trial_page(climbed)
    assert page.startswith("<!doctype html>") and "<polyline" in page and "<script" not in page
    document = json.loads(json.dumps(describe_trial(climbed)))
    assert document["plan"]["strategy"]["micro_batch_size"] == climbed.best.strategy.micro_batch_size  # type: ignore[union-attr]
    assert all(describe_run(run).startswith("ran ") for run in climbed.runs)


def test_a_plan_that_was_tried_is_a_plan(climbed: Trial, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert climbed.plan is not None
    brim.save_plan(climbed.plan, path)
    assert brim.load_plan(path) == climbed.plan
    assert brim.export(climbed.plan, "transformers").keywords["per_device_train_batch_size"] >= 1


def test_a_plan_is_run_as_it_is_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, path = make_plan(tmp_path, micro_batch_size=2), tmp_path / "plan.json"
    brim.save_plan(plan, path)
    assert main(["trial", str(path), "--no-history", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["runs"]) == 1 and shown["best"]["strategy"]["micro_batch_size"] == 2
    assert main(["trial", str(path), "--device", "cpu:1MiB", "--no-history"]) == 3
    output = " ".join(capsys.readouterr().out.split())
    assert output.startswith("Does not fit: micro-batch 2 x accumulation 4 with no checkpointing on cpu: out of memory")
    assert main(["trial", str(path), "--seq-len", "64"]) == 2
    assert "a plan says its job itself; leave seq_len out" in capsys.readouterr().err


def test_what_is_run_is_kept_in_the_history(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from brim import api

    monkeypatch.setenv("BRIM_HISTORY", str(tmp_path / "history.sqlite"))
    job: dict[str, Any] = {**JOB, "history": None, "micro_batch_size": 1, "activation_checkpointing": "none"}
    estimates = brim.estimate(model, by=("formula", "trial"), gpu="cpu:64MiB", **job)
    assert [one.source for one in estimates] == ["formula", "trial"]
    (run,) = api.list_observations()
    assert run.kind == "trial" and run.peak_allocated_bytes == estimates[1].peak_allocated_bytes


def test_nothing_that_fits_is_said_with_the_way_out(model: str) -> None:
    with pytest.raises(DoesNotFit, match=r"nothing that was tried fits: micro-batch 1 .* out of memory; try a larger"):
        brim.plan(model, by="trial", gpu="cpu:1MiB", **{**JOB, "micro_batch_size": 1})


def test_a_script_that_fails_is_no_matter_of_memory(tmp_path: Path) -> None:
    script = write_script(tmp_path / "mine", 'raise ValueError("no such column")')
    with pytest.raises(ProbeFailed, match="no such column"):
        brim.trial(make_plan(tmp_path), script=script)


def test_ranks_and_devices_must_agree(tmp_path: Path) -> None:
    plan = brim.plan(write_model(tmp_path), gpu="24GiB:4", **JOB)
    with pytest.raises(InvalidInput, match="torchrun --nproc-per-node 4 -m brim trial"):
        brim.trial(plan)


def test_on_two_ranks_the_weakest_decides(tmp_path: Path) -> None:
    """Rank 1 runs out of memory in its second step, where rank 0 waits for its gradients: both hear of it."""
    write_model(tmp_path / "model")
    failing = (
        'self.count = getattr(self, "count", 0) + 1; '
        'fails = os.environ["RANK"] == "1" and self.count == 5 and len(args[1]["input_ids"]) > 1\n'
        '        if fails: raise torch.OutOfMemoryError("no room")'
    )
    script = write_script(tmp_path / "mine", failing)
    job = [f"--{name.replace('_', '-')}={value}" for name, value in JOB.items() if name != "history"]
    out = tmp_path / "trial.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "brim", "trial",
        str(tmp_path / "model"), "--device", "cpu:64MiB", "--script", script, "--no-history", "--json", *job,
        "--activation-checkpointing", "none",
    ]  # fmt: skip
    with out.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.PIPE, text=True, timeout=400, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    shown = json.loads(out.read_text(encoding="utf-8"))
    assert shown["best"]["strategy"]["micro_batch_size"] == 1 and shown["best"]["num_ranks"] == 2
    assert {run["problem"] for run in shown["runs"] if run["strategy"]["micro_batch_size"] > 1} == {"out of memory"}


@pytest.mark.slow
def test_the_climb_finds_what_an_exhaustive_search_finds(model: str) -> None:
    """On a CPU times are noisy: the choice must be within a fifth of the best of all that fit."""
    from dataclasses import replace

    found = brim.trial(model, device=f"cpu:{CAPACITY}", **JOB)
    assert found.plan is not None
    speeds = {}
    for point in found.points:
        if point.fits:
            run = brim.trial(replace(found.plan, strategy=point.strategy), device=f"cpu:{CAPACITY}").runs[0]
            speeds[point.strategy] = run.tokens_per_second or 0.0
    assert speeds[found.plan.strategy] >= 0.8 * max(speeds.values())



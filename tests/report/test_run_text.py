"""A watched run as text: every number beside what had been said, every verdict in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from brim.report.run import format_run
from brim.runtime.run_record import Expected, Measured, RunRecord, describe_run, read_run
from brim.runtime.sight import Verdict
from brim.spec.observation import Prediction

GIB = 2**30
RECORD = RunRecord(
    state="ended",
    expected=Expected(
        prediction=Prediction(
            source="formula", peak_allocated_bytes=12 * GIB, peak_reserved_bytes=13 * GIB, device_bytes=14 * GIB,
            step_seconds=2.0,
        ),
        longest_tokens=2048, tokens_per_second=8000.0, budget_bytes=20 * GIB, capacity_bytes=24 * GIB,
        as_run_allocated_bytes=10 * GIB, as_run_seconds=1.5,
    ),
    measured=Measured(
        num_steps=1200, num_ranks=2, device="NVIDIA GeForce RTX 4090", capacity_bytes=24 * GIB,
        peak_allocated_bytes=11 * GIB, aside_bytes=15 * GIB, peak_reserved_bytes=16 * GIB, device_bytes=17 * GIB,
        longest_tokens=1536, coming_tokens=2048, step_seconds=1.8, tokens_per_second=6400.0, padding_fraction=0.25,
    ),
    verdicts=(
        Verdict(code="slow", severity="warning", text="a step takes long; look at data loading", step=20),
        Verdict(code="spill", severity="danger", text="the rest lies in host memory", step=30, facts={"a": 1}),
        Verdict(code="split", severity="note", text="another split; the same batch"),
    ),
)  # fmt: skip


def test_numbers_and_verdicts(render: Callable[..., str]) -> None:
    text = render(format_run(RECORD))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "Ended after 1,200 optimizer steps on 2 ranks on NVIDIA GeForce RTX 4090 of 24.00 GiB"
    for line in (
        "tensors, GiB 12.00 10.00 11.00 +10 %", "evaluation, GiB - - 15.00 -", "reserved, GiB 13.00 - 16.00 +23 %",
        "step 2 s 1.5 s 1.8 s +20 %", "real tokens/s 8,000 - 6,400 -20 %",
        "- longest sequence so far 1,536 tokens, 2,048 planned, 2,048 to come", "- 25 % of the tokens run are padding",
        "- step 30: the rest lies in host memory", "- another split; the same batch",
    ):  # fmt: skip
        assert line in lines
    assert lines.index("Danger") < lines.index("Warnings") < lines.index("Notes")


def test_what_is_not_known_is_left_out(render: Callable[..., str]) -> None:
    bare = RunRecord(state="died", problem="out of memory", measured=Measured(num_steps=1, device="cpu"))
    text = render(format_run(bare))
    assert text.startswith("Died after 1 optimizer step on cpu: out of memory")
    assert "GiB" not in text and "Warnings" not in text


@pytest.mark.parametrize("changes", [{}, {"expected": None}, {"state": "running"}])
def test_written_and_read_it_is_the_same(changes: dict[str, Any]) -> None:
    record = replace(RECORD, **changes)
    assert read_run(describe_run(record), path="brim-run.json") == record

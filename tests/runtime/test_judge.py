"""What is said of a run, from its numbers alone: every verdict at the edge of its threshold, and its sentence."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from brim.runtime.judge import judge, judge_first_loss, judge_loss, judge_split
from brim.runtime.sight import Fitting, Sight, Verdict, describe_progress
from brim.runtime.worst import Numbers, find_worst
from brim.units import GIB, MIB

FINE = Sight(
    step=20, micro_batch_size=4, gradient_accumulation_steps=4, capacity_bytes=24 * GIB, budget_bytes=20 * GIB,
    peak_allocated_bytes=12 * GIB, peak_reserved_bytes=13 * GIB, first_step=3, first_allocated_bytes=12 * GIB,
    first_reserved_bytes=13 * GIB, seen_tokens=1024, coming_tokens=2048, seen_estimate_bytes=12 * GIB,
    coming_estimate_bytes=18 * GIB, step_seconds=2.0, estimate_seconds=1.9, first_token_seconds=1e-4,
    token_seconds=1.1e-4, tokens_per_second=8000.0, padding_fraction=0.1,
)  # fmt: skip


def see(**changes: Any) -> list[Verdict]:
    return list(judge(replace(FINE, **changes)))


def test_a_run_as_planned_has_nothing_said_of_it() -> None:
    assert see() == []
    assert judge(Sight(step=2)) == ()  # nobody can say anything: a CPU, no plan


# what is changed, code, severity, words of the sentence
CASES: list[tuple[dict[str, Any], str, str, list[str]]] = [
    ({"coming_estimate_bytes": 21 * GIB}, "peak_ahead", "warning",
     ["2,048 tokens", "21.00 GiB", "20.00 GiB", "1,024 tokens", "1.00 times", "smaller micro-batch"]),
    ({"coming_estimate_bytes": 25 * GIB, "fitting": Fitting(micro_batch_size=2, gradient_accumulation_steps=8)},
     "peak_ahead", "danger", ["and the card", "what fits: micro-batch 2 x accumulation 8"]),
    ({"coming_estimate_bytes": 21 * GIB, "fitting": Fitting(longest_tokens=1984, activation_checkpointing="full")},
     "peak_ahead", "warning", ["full activation checkpointing", "or sequences cut at 1,984 tokens"]),
    ({"coming_estimate_bytes": 21 * GIB, "rank": 3}, "peak_ahead", "warning", ["on rank 3"]),
    ({"peak_allocated_bytes": 21 * GIB, "peak_reserved_bytes": 22 * GIB, "seen_estimate_bytes": 20 * GIB},
     "over_budget", "warning", ["21.00 GiB", "20.00 GiB"]),
    ({"aside_bytes": 22 * GIB}, "evaluation_over_budget", "warning", ["22.00 GiB", "per_device_eval_batch_size"]),
    ({"seen_estimate_bytes": 6 * GIB, "coming_estimate_bytes": 8 * GIB}, "estimate_low", "warning",
     ["12.00 GiB", "6.00 GiB", "2.00 times"]),
    ({"seen_estimate_bytes": 20 * GIB}, "estimate_high", "note", ["0.60 times", "room"]),
    ({"peak_reserved_bytes": 17 * GIB}, "fragmentation", "warning",
     ["13.00 GiB at step 3", "17.00 GiB", "PYTORCH_ALLOC_CONF=expandable_segments:True"]),
    ({"peak_reserved_bytes": 17 * GIB, "allocator_variable": "PYTORCH_CUDA_ALLOC_CONF"}, "fragmentation", "warning",
     ["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"]),
    ({"peak_reserved_bytes": 17 * GIB, "expandable": True}, "fragmentation", "warning", ["multiple of 64"]),
    ({"peak_reserved_bytes": 25 * GIB, "first_reserved_bytes": 25 * GIB}, "spill", "danger", ["host memory"]),
    ({"num_retries": 1}, "retries", "warning", ["1 time in 20 steps"]),
    ({"num_retries": 7}, "retries", "warning", ["7 times in 20 steps"]),
    ({"num_ooms": 2}, "out_of_memory", "danger", ["2 allocations were refused"]),
    ({"step_seconds": 4.0}, "slow", "warning", ["4 s", "1.9 s", "2.1 times"]),
    ({"token_seconds": 2e-4}, "slowing", "warning", ["5,000 tokens/s", "10,000"]),
    ({"padding_fraction": 0.5}, "padding", "warning", ["50 % of the tokens", "8,000 real tokens/s of 16,000"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "code", "severity", "words"), CASES, ids=lambda value: str(value)[:40])
def test_each_trouble_is_told_by_itself(changes: dict[str, Any], code: str, severity: str, words: list[str]) -> None:
    (verdict,) = see(**changes)
    assert (verdict.code, verdict.severity, verdict.step) == (code, severity, 20)
    assert all(word in verdict.text for word in words), verdict.text
    assert verdict.text.isprintable()
    assert verdict.facts


@pytest.mark.parametrize("changes", [
    {"coming_estimate_bytes": 20 * GIB},
    {"coming_estimate_bytes": 25 * GIB, "coming_tokens": 1024},  # nothing longer comes
    {"budget_bytes": None, "coming_estimate_bytes": 25 * GIB},
    {"seen_estimate_bytes": round(12 * GIB / 1.09), "coming_estimate_bytes": 15 * GIB},
    {"peak_reserved_bytes": 14 * GIB},  # grew by 1 GiB, 2 GiB over tensors: 8 % of the card
    {"peak_reserved_bytes": 17 * GIB, "peak_allocated_bytes": 16 * GIB, "seen_estimate_bytes": 16 * GIB},
    {"peak_reserved_bytes": 17 * GIB, "first_reserved_bytes": 17 * GIB},  # as large from the start
    {"step_seconds": 2.8},
    {"token_seconds": 1.29e-4},
    {"padding_fraction": 0.29},
    {"padding_fraction": 0.5, "step": 4},
], ids=str)  # fmt: skip
def test_short_of_a_threshold_nothing_is_said(changes: dict[str, Any]) -> None:
    assert see(**changes) == []


def test_an_estimate_that_is_low_makes_what_comes_larger() -> None:
    sight = replace(FINE, seen_estimate_bytes=10 * GIB)
    assert sight.ratio == pytest.approx(1.2)
    assert sight.coming_peak_bytes == pytest.approx(21.6 * GIB, rel=1e-9)
    codes = [verdict.code for verdict in judge(sight)]
    assert codes == ["peak_ahead", "estimate_low"]


# 12 GiB measured; estimated then and later, scores then and later, and what comes in GiB, None if not by scores
SCORES = [
    (11.0, 15.0, 0.5, 4.0, 15 + 2 * 4), (11.0, 16.0, 1.0, 5.0, 16 + 1 * 5),
    (11.0, 15.0, 0.1, 4.0, None),  # ten times what scores are: something else
    (11.0, 15.0, 10.0, 4.0, None),  # a tenth of them
    (11.9, 15.0, 0.1, 4.0, None),  # within the formula's own error
    (13.0, 15.0, 0.5, 4.0, None), (11.0, 15.0, 0.0, 0.0, None),
]  # fmt: skip


@pytest.mark.parametrize(("before", "later", "short", "long", "found"), SCORES)
def test_attention_that_keeps_its_scores(
    before: float, later: float, short: float, long: float, found: float | None
) -> None:
    sight = replace(
        FINE, seen_estimate_bytes=round(before * GIB), coming_estimate_bytes=round(later * GIB),
        seen_scores_bytes=round(short * GIB), coming_scores_bytes=round(long * GIB),
    )  # fmt: skip
    bare = replace(sight, seen_scores_bytes=0).coming_peak_bytes
    assert (sight.scores_share is not None) == (found is not None)
    assert sight.coming_peak_bytes == (pytest.approx(found * GIB, rel=1e-9) if found is not None else bare)
    if found is not None:
        text = next(verdict.text for verdict in judge(sight) if verdict.code == "peak_ahead")
        assert "as if attention kept its scores" in text
        low = judge(replace(sight, peak_allocated_bytes=13 * GIB, seen_scores_bytes=GIB, budget_bytes=None))
        assert any("eager" in verdict.text for verdict in low if verdict.code == "estimate_low")


def test_an_estimate_that_is_high_is_high_by_as_much() -> None:
    assert replace(FINE, seen_estimate_bytes=14 * GIB).coming_peak_bytes == 16 * GIB


def test_an_estimate_that_is_high_is_no_room_where_none_is() -> None:
    assert [one.code for one in see(seen_estimate_bytes=20 * GIB, coming_estimate_bytes=30 * GIB)] == ["peak_ahead"]


def test_what_comes_is_never_said_to_be_below_what_was() -> None:
    assert replace(FINE, coming_estimate_bytes=GIB).coming_peak_bytes == 12 * GIB


def test_the_worst_comes_first() -> None:
    found = see(peak_reserved_bytes=25 * GIB, padding_fraction=0.5, seen_estimate_bytes=30 * GIB)
    assert [verdict.severity for verdict in found] == ["danger", "warning", "warning", "note"]


@pytest.mark.parametrize(("loss", "mean", "k", "found"), [
    (8.0, 2.0, 4, True), (2.0, 2.0, 4, False), (4.9, 2.0, 4, False), (5.1, 2.0, 4, True), (3.1, 2.0, 2, True),
    (2.9, 2.0, 2, False), (2.0, 2.0, 1, False), (17.0, 2.0, 4, False), (math.nan, 2.0, 4, False),
    (2.0, 0.0, 4, False), (math.inf, 2.0, 4, False),
])  # fmt: skip
def test_a_loss_that_is_a_sum(loss: float, mean: float, k: int, found: bool) -> None:
    verdict = judge_loss(1, loss, mean, k)
    assert (verdict is not None) == found
    if verdict is not None:
        assert verdict.code == "loss_scale" and f"{loss / mean:.2f} times too large" in verdict.text


def test_a_first_loss_above_that_of_knowing_nothing() -> None:
    verdict = judge_first_loss(1, 40.0, 32000, 4)
    assert verdict is not None and "10.373" in verdict.text and verdict.severity == "danger"
    assert judge_first_loss(1, 12.0, 32000, 4) is None
    assert judge_first_loss(1, 40.0, 32000, 1) is None
    assert judge_first_loss(1, math.nan, 32000, 4) is None


def test_another_split_than_the_plans() -> None:
    assert judge_split(0, ran=(4, 4, 1), planned=(4, 4, 1), effective=16) is None
    other = judge_split(0, ran=(2, 8, 1), planned=(4, 4, 1), effective=16)
    assert other is not None and other.severity == "note" and "the effective batch is the same" in other.text
    smaller = judge_split(0, ran=(2, 4, 2), planned=(4, 8, 1), effective=32)
    assert smaller is not None and smaller.severity == "warning"
    assert "micro-batch 2 x accumulation 4 x 2 ranks = 16 sequences" in smaller.text


def test_progress_in_one_line() -> None:
    line = describe_progress(FINE)
    assert line.startswith("step 20: tensors peak at 12.00 GiB of a budget of 20.00 GiB (estimate 12.00 GiB)")
    assert line.endswith("2 s a step (estimate 1.9 s), 8,000 tokens/s")
    assert describe_progress(Sight(step=3)) == "step 3"


def test_the_worst_rank_is_found() -> None:
    calm = Numbers(allocated_bytes=10, trained_bytes=10, run_tokens=100, real_tokens=90, capacity_bytes=30)
    full = Numbers(allocated_bytes=20, trained_bytes=18, num_retries=2, run_tokens=80, real_tokens=80,
                   capacity_bytes=24)  # fmt: skip
    worst = find_worst([calm, full, calm])
    assert worst.rank == 1 and worst.num_ranks == 3
    assert (worst.numbers.trained_bytes, worst.numbers.num_retries, worst.numbers.capacity_bytes) == (18, 2, 24)
    assert (worst.numbers.run_tokens, worst.numbers.real_tokens) == (100, 90)
    assert find_worst([Numbers()]).numbers == Numbers()


def test_judging_needs_no_torch() -> None:
    code = "import sys; import brim.runtime.judge, brim.runtime.run_record; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_small_cards_ask_for_growth_that_is_no_noise() -> None:
    small = {
        "capacity_bytes": 256 * MIB, "budget_bytes": None, "peak_allocated_bytes": 100 * MIB,
        "seen_estimate_bytes": None, "first_allocated_bytes": 100 * MIB, "first_reserved_bytes": 110 * MIB,
    }  # fmt: skip
    assert see(**small, peak_reserved_bytes=160 * MIB) == []
    assert [verdict.code for verdict in see(**small, peak_reserved_bytes=180 * MIB)] == ["fragmentation"]

"""A corrected answerer: another micro-batch in the expected direction, and the plan says so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_toys import make_job, make_plan, toy_answerer

from brim.cost.calibration import SETTLED_RUNS, calibrated_margin_fraction
from brim.cost.correction import Calibration, Correction
from brim.cost.estimate import certain_bytes
from brim.planner.answerer import answer_by_formula
from brim.planner.calibrated import calibrated, correct, is_meant
from brim.planner.document import describe_plan, read_plan
from brim.planner.paging import paged_bytes
from brim.planner.plan import plan_workload


def make_correction(factor: float, *, runs: int = SETTLED_RUNS, error: float = 0.0) -> Correction:
    return Correction(
        factor=factor, num_runs=runs, num_different=runs, median_error_fraction=error / 2, worst_error_fraction=error,
        worst_shortfall_fraction=error,
    )  # fmt: skip


def make_calibration(factor: float = 1.0, **said: object) -> Calibration:
    facts = {"device": "rtx-4090", "torch": "2.6", "trainer": "trl", "model_type": "llama"}
    return Calibration(**(facts | {"allocated": make_correction(factor)} | said))  # type: ignore[arg-type]


def choose(factor: float, error: float = 0.0) -> int:
    answerer = calibrated(toy_answerer(), make_calibration(allocated=make_correction(factor, error=error)))
    return make_plan(answerer, gpu="rtx-4090", model="8B", trainer="trl").strategy.micro_batch_size


def test_the_micro_batch_follows_the_measured_runs() -> None:
    sizes = [choose(factor) for factor in (2.4, 1.5, 1.0, 0.5)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert choose(0.5, error=1.0) == choose(1.0), "a factor below 1 that held-out runs do not bear out is not used"


def test_the_plan_says_what_it_rests_on() -> None:
    known = make_calibration(1.05, allocated=make_correction(1.05, runs=12, error=0.02), seconds=make_correction(1.3))
    job = make_job("8B", "rtx-4090", method="qlora")
    plan = plan_workload(job.workload, job.fixed, calibrated(answer_by_formula(), known))
    text = "\n".join(plan.reasons)
    assert (
        "peak calibrated on 12 runs of llama models on rtx-4090 (torch 2.6, trl): measured was 1.050 x the formula's; "
        "held-out error median 1.0%, worst 2.0%"
    ) in text
    assert "less 2.0% for the error of the estimate" in text
    assert "step time by formula, calibrated on 9 runs of this card, held-out error median 0.0%, worst 0.0%" in text
    assert plan.estimate.calibration == known and "unmeasured" not in text
    assert plan.estimate.margin_bytes == pytest.approx(0.02 * plan.estimate.peak_allocated_bytes, rel=1e-6)
    assert read_plan(json.dumps(describe_plan(plan)), path="plan.json") == plan
    again = plan_workload(job.workload, job.fixed, calibrated(answer_by_formula(), known))
    assert again == plan


def test_repetitions_and_caution_are_said() -> None:
    cautious = replace(make_correction(0.8, runs=5, error=0.1), num_runs=7)
    job = make_job("8B", "rtx-4090", method="qlora")
    plan = plan_workload(job.workload, job.fixed, calibrated(answer_by_formula(), make_calibration(allocated=cautious)))
    text = "\n".join(plan.reasons)
    assert "on 7 runs (5 different) of llama" in text
    assert "measured was 0.800 x the formula's, of which 0.880 x is used;" in text


@settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 3.0), st.floats(0.0, 0.3), st.sampled_from(["none", "full"]), st.integers(1, 8))
def test_moments_ledgers_and_search_agree(factor: float, error: float, checkpointing: str, micro: int) -> None:
    bare, job = answer_by_formula(), make_job("8B", "rtx-4090", method="qlora")
    known = make_calibration(
        allocated=make_correction(factor, error=error), slack=make_correction(1.2), context=make_correction(1.1)
    )
    strategy = replace(
        make_plan(gpu="rtx-4090").strategy, micro_batch_size=micro, gradient_accumulation_steps=2,
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    answerer = calibrated(bare, known)
    plain, found = bare.estimate(job.workload, strategy), answerer.estimate(job.workload, strategy)
    assert found.peak_allocated_bytes == answerer.peak(job.workload, strategy)
    assert found.peak_allocated_bytes == max(moment.total_bytes for moment in found.moments)
    assert found.peak_moment == answerer.moment(job.workload, strategy)
    assert found.peak_allocated_bytes <= found.peak_reserved_bytes <= found.device_bytes
    for before, after in zip(plain.moments, found.moments, strict=True):
        assert after.total_bytes == known.allocated.scale(before.total_bytes)
        rows = {name: getattr(after.ledger, name) for name in after.ledger.__dataclass_fields__}
        assert min(rows.values()) >= 0
        if after.total_bytes >= before.total_bytes:
            assert after.ledger.parameters == before.ledger.parameters, "weights are known to the byte"
            assert after.ledger.optimizer_states == before.ledger.optimizer_states
    assert answerer.budget(job.workload).budget_bytes == pytest.approx(
        bare.budget(job.workload).budget_bytes * 1.008 / (1 + calibrated_margin_fraction(known)), rel=1e-3
    )


def test_a_peak_is_never_below_weights_and_states() -> None:
    """Runs full of activations say little of a strategy that is nearly all weights."""
    job = make_job("8B", "rtx-4090", method="qlora")
    strategy = replace(
        make_plan(gpu="rtx-4090").strategy, micro_batch_size=1, gradient_accumulation_steps=32,
        activation_checkpointing="full",
    )  # fmt: skip
    bare = answer_by_formula()
    answerer = calibrated(bare, make_calibration(0.3), certain_bytes)
    found, certain = answerer.estimate(job.workload, strategy), certain_bytes(job.workload, strategy)
    plain = bare.estimate(job.workload, strategy)
    assert 0.3 * plain.peak_allocated_bytes < certain < plain.peak_allocated_bytes
    assert found.peak_allocated_bytes == answerer.peak(job.workload, strategy) == certain
    assert found.peak_allocated_bytes == max(moment.total_bytes for moment in found.moments)
    ledgers = [moment.ledger for moment in plain.moments]
    assert certain == max(row.parameters + row.gradients + row.optimizer_states for row in ledgers)


def test_other_cards_trainers_and_families_are_answered_as_before() -> None:
    bare, known = answer_by_formula(), make_calibration(2.0, seconds=make_correction(3.0))
    answerer = calibrated(bare, known)
    strategy = make_plan().strategy
    for model, gpu, trainer in (
        ("8B", "h100", "trl"),
        ("8B", "rtx-4090", "plain"),
        ("Qwen/Qwen3-8B", "rtx-4090", "trl"),
    ):
        workload = make_job(model, gpu, trainer=trainer, method="qlora").workload
        assert not is_meant(workload, known)
        assert answerer.peak(workload, strategy) == bare.peak(workload, strategy)
        assert answerer.seconds(workload, strategy) == bare.seconds(workload, strategy)
        assert answerer.estimate(workload, strategy) == bare.estimate(workload, strategy)
        assert answerer.budget(workload) == bare.budget(workload)
    workload = make_job("8B", "rtx-4090", trainer="trl", method="qlora").workload
    assert answerer.seconds(workload, strategy) == 3 * (bare.seconds(workload, strategy) or 0)
    step = answerer.estimate(workload, strategy).step_time
    assert step is not None and step.step_seconds == pytest.approx(answerer.seconds(workload, strategy))


def test_paged_states_stay_what_they_were() -> None:
    job = make_job("8B", "rtx-4090", method="qlora", optimizer="paged_adamw_8bit")
    strategy = make_plan(gpu="rtx-4090").strategy
    plain = answer_by_formula().estimate(job.workload, strategy)
    known = make_calibration(1.1, context=make_correction(1.5), slack=make_correction(0.5))
    found = correct(job.workload, plain, known)
    assert paged_bytes(job.workload, plain) == paged_bytes(job.workload, found) > 0

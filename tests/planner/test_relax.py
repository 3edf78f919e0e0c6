from __future__ import annotations

from typing import Any

import pytest
from planner_toys import GIB, make_job, toy_answerer

from brim.errors import DoesNotFit
from brim.planner.answerer import Answerer
from brim.planner.plan import plan_workload


def refusal(answerer: Answerer, **options: Any) -> DoesNotFit:
    job = make_job(**options)
    with pytest.raises(DoesNotFit) as refused:
        plan_workload(job.workload, job.fixed, answerer)
    return refused.value


def changes(error: DoesNotFit) -> list[str]:
    return [relaxation.change for relaxation in error.relaxations]


def test_the_verdict_is_one_line_with_numbers() -> None:
    error = refusal(toy_answerer(base_bytes=6 * GIB), method="full")
    assert str(error) == (
        "full fine-tuning of meta-llama/Llama-2-7b-hf at 2,048 tokens does not fit 24GiB: the smallest strategy "
        "(micro-batch 1, full checkpointing) needs 30.06 GiB at loss, 8.46 GiB more than the 21.60 GiB budget"
    )
    assert error.exit_code == 3 and error.at_moment == "loss"
    assert error.gap_bytes == error.facts["peak_allocated_bytes"] - error.facts["budget_bytes"] > 0


def test_ways_out_are_cheapest_first_and_all_fit() -> None:
    error = refusal(toy_answerer(base_bytes=6 * GIB), method="full")
    assert changes(error)[:3] == ["--optimizer adamw-8bit", "--method lora", "--method qlora"]
    assert changes(error)[3].startswith("--gpu ")
    assert all(relaxation.fits and relaxation.peak_allocated_bytes > 0 for relaxation in error.relaxations)


def test_a_way_out_is_true() -> None:
    answerer = toy_answerer(base_bytes=6 * GIB)
    way_out = {relaxation.change: relaxation for relaxation in refusal(answerer, method="full").relaxations}
    job = make_job(method="lora")
    plan = plan_workload(job.workload, job.fixed, answerer)
    assert plan.estimate.peak_allocated_bytes == way_out["--method lora"].peak_allocated_bytes


def test_the_length_is_solved() -> None:
    answerer = toy_answerer(base_bytes=10 * GIB, sequence_bytes=30 * GIB)
    error = refusal(answerer, method="qlora", gpu="8GiB")
    assert "--seq-len 1536" in changes(error)
    job = make_job(method="qlora", gpu="8GiB", seq_len=1536)
    plan_workload(job.workload, job.fixed, answerer)


def test_a_fixed_knob_is_the_first_to_go() -> None:
    error = refusal(toy_answerer(), micro_batch_size=32, activation_checkpointing="none", gpu="10GiB")
    assert changes(error)[0] == "--activation-checkpointing full"
    assert "leave out --micro-batch-size" in changes(error)


def test_a_smaller_effective_batch_is_never_offered() -> None:
    error = refusal(toy_answerer(base_bytes=100 * GIB), method="full")
    assert not any("batch" in change for change in changes(error))


def test_two_changes_together_when_one_is_not_enough() -> None:
    answerer = toy_answerer(base_bytes=70 * GIB, sequence_bytes=40 * GIB)
    error = refusal(answerer, method="lora", gpu="20GiB")
    assert any(change.startswith("--method qlora --seq-len") for change in changes(error))


def test_a_shorter_length_on_the_largest_card_is_the_last_resort() -> None:
    answerer = toy_answerer(base_bytes=20 * GIB, sequence_bytes=60 * GIB)
    error = refusal(answerer, method="qlora", gpu="4GiB", seq_len=131_072)
    assert len(error.relaxations) == 1 and error.relaxations[0].fits
    assert changes(error)[0].startswith("--gpu ") and "--seq-len" in changes(error)[0]


def test_the_closest_is_shown_when_nothing_fits() -> None:
    error = refusal(toy_answerer(base_bytes=4000 * GIB), method="full", gpu="h100")
    assert changes(error) == ["--method qlora"] and not error.relaxations[0].fits


def test_replicas_are_named_on_several_devices() -> None:
    error = refusal(toy_answerer(base_bytes=40 * GIB), method="full", gpu="h100:8")
    assert str(error).endswith("each of the 8 devices holds a whole replica (sharding is not planned yet)")

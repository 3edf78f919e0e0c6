from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from planner_toys import GIB, make_job, toy_answerer

from brim.errors import DoesNotFit, InvalidStrategy
from brim.planner.answerer import Answerer, answer_by_formula
from brim.planner.plan import plan_workload
from brim.planner.search import search
from brim.spec.device import hold_cpu
from brim.tables.read import find_device, list_devices


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


def test_a_cpu_held_to_a_size_has_no_larger_card() -> None:
    job = make_job(method="full")
    cluster = replace(job.workload.cluster, device=hold_cpu(2 * GIB))
    with pytest.raises(DoesNotFit, match="does not fit cpu") as refused:
        plan_workload(replace(job.workload, cluster=cluster), job.fixed, answer_by_formula())
    assert [change for change in changes(refused.value) if "--gpu" in change] == []


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


@pytest.mark.parametrize(
    ("model", "gpu", "card"),
    [("32B", "rtx-4090", "rtx-5090"), ("8B", "rtx-3070", "rtx-3080-10gb")],
)
def test_the_card_is_the_smallest_that_fits(model: str, gpu: str, card: str) -> None:
    error = refusal(answer_by_formula(), model=model, gpu=gpu, method="qlora")
    assert f"--gpu {card}" in changes(error)


def test_every_smaller_card_is_refused() -> None:
    answerer = answer_by_formula()
    error = refusal(answerer, model="13B", gpu="rtx-3070", method="lora")
    offered = next(change.split()[1] for change in changes(error) if change.startswith("--gpu "))
    size = find_device(offered).capacity_bytes
    job = make_job(model="13B", gpu="rtx-3070", method="lora")
    for device in (row for row in list_devices() if row.vendor == "nvidia" and row.capacity_bytes < size):
        workload = replace(job.workload, cluster=replace(job.workload.cluster, device=device))
        with pytest.raises((DoesNotFit, InvalidStrategy)):
            found = search(workload, job.fixed, answerer, answerer.budget(workload).budget_bytes)
            if found.best is None:
                raise DoesNotFit("", gap_bytes=0, at_moment="")


def test_unquantised_experts_are_the_reason_and_qlora_is_no_way_out() -> None:
    mixtral = "mistralai/Mixtral-8x7B-v0.1"
    error = refusal(answer_by_formula(), model=mixtral, gpu="rtx-4090", method="qlora")
    assert "84.00 GiB of it are experts that are not quantised (experts_unquantised: transformers 5" in str(error)
    assert error.facts["experts_unquantised_bytes"] == 84 * GIB
    error = refusal(answer_by_formula(), model=mixtral, gpu="a100-40gb", method="lora")
    assert not any("qlora" in change for change in changes(error))

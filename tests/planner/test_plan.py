from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from planner_toys import GIB, MIB, make_job, toy_answerer

from brim.planner.alternatives import MOST_ROWS
from brim.planner.answerer import Answerer
from brim.planner.plan import plan_workload
from brim.planner.record import Plan


def make_plan(answerer: Answerer | None = None, **options: Any) -> Plan:
    job = make_job(**options)
    return plan_workload(job.workload, job.fixed, answerer or toy_answerer(), assumptions=job.assumptions)


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 8, 30, 32, 64, 120, 256]), length=st.sampled_from([128, 2048, 8192]),
    mib=st.integers(1, 900), gpu=st.sampled_from(["24GiB", "rtx-4090", "h100:2"]),
    trainer=st.sampled_from(["trl", "plain", "unsloth"]), timed=st.booleans(),
)  # fmt: skip
def test_a_plan_keeps_the_batch_and_the_budget(
    size: int, length: int, mib: int, gpu: str, trainer: str, timed: bool
) -> None:
    ranks = 2 if gpu == "h100:2" else 1
    options = {"gpu": gpu, "effective_batch_size": size * ranks, "seq_len": length, "trainer": trainer}
    answerer = toy_answerer(sequence_bytes=mib * MIB, timed=timed)
    plan = make_plan(answerer, **options)
    strategy = plan.strategy
    product = strategy.micro_batch_size * strategy.gradient_accumulation_steps * strategy.mesh.data_parallel_size
    assert product == plan.effective_batch_size == size * ranks
    assert plan.effective_batch_tokens == size * ranks * length
    assert plan.estimate.peak_allocated_bytes <= plan.budget_bytes < plan.capacity_bytes
    assert make_plan(answerer, **options) == plan
    assert len(plan.rejected) <= MOST_ROWS
    assert strategy not in [rejected.strategy for rejected in plan.rejected]
    for rejected in plan.rejected:
        assert rejected.over_bytes == rejected.peak_allocated_bytes - plan.budget_bytes
        assert rejected.reason and (rejected.relative_step_time is None) == (not timed)


def test_reasons_say_what_limits() -> None:
    answerer = toy_answerer(base_bytes=10 * GIB, sequence_bytes=3 * GIB)
    plan = make_plan(answerer, gpu="rtx-4090", effective_batch_size=32)
    assert plan.strategy.micro_batch_size == 2
    assert plan.reasons == (
        "micro-batch 2 x accumulation 16 x 1 rank = 32 sequences, exactly the effective batch (given by the user)",
        "peak 16.00 GiB at loss, 5.16 GiB below the budget",
        "micro-batch 4 would be over by 0.84 GiB at loss",
        "no checkpointing: nothing is computed twice",
        "budget 21.16 GiB: 90 % of the 23.51 GiB left of 23.51 GiB after the process's own context",
        "step time by formula (unmeasured on this card)",
    )


def test_checkpointing_is_explained_by_what_it_replaces() -> None:
    needed = make_plan(toy_answerer(sequence_bytes=16 * GIB), gpu="rtx-4090")
    assert "full checkpointing: without it even micro-batch 1 is over by 0.84 GiB" in needed.reasons
    pays = make_plan(toy_answerer(sequence_bytes=10 * GIB, launch_seconds=0.5), gpu="rtx-4090")
    assert pays.strategy.activation_checkpointing == "full"
    assert any("pays: without it micro-batch 1 is the best that fits" in reason for reason in pays.reasons)


def test_alternatives_show_their_price() -> None:
    plan = make_plan(toy_answerer(base_bytes=10 * GIB, sequence_bytes=3 * GIB, launch_seconds=0.02), gpu="rtx-4090")
    reasons = {
        (row.strategy.micro_batch_size, row.strategy.activation_checkpointing): row.reason for row in plan.rejected
    }
    assert reasons[(4, "none")] == "over by 0.84 GiB at loss"
    assert reasons[(1, "none")].startswith("1.09x slower: 32 micro-batches per step instead of 16")
    assert "full checkpointing recomputes the forward pass" in reasons[(16, "full")]


def test_no_seconds_where_the_speed_is_unknown() -> None:
    plan = make_plan(toy_answerer(timed=False))
    assert plan.estimate.step_time is None and plan.schedule.epoch_seconds is None
    assert plan.reasons[-1] == (
        "24GiB: no speed is known for this set-up: ranked by recomputation and by tokens per micro-batch"
    )


def test_a_whole_batch_in_one_micro_batch_says_so() -> None:
    plan = make_plan(toy_answerer(sequence_bytes=MIB, launch_seconds=1.0), effective_batch_size=8)
    assert plan.strategy.gradient_accumulation_steps == 1
    assert "the whole batch fits in one micro-batch per rank, so nothing is accumulated" in plan.reasons


def test_what_was_fixed_is_named() -> None:
    plan = make_plan(micro_batch_size=4, activation_checkpointing="full")
    assert "kept as asked: activation_checkpointing full, micro_batch_size 4" in plan.reasons

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from planner_toys import MIB, make_plan, toy_answerer

from brim.planner.alternatives import MOST_ROWS


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
        assert rejected.over_bytes == max(0, rejected.peak_allocated_bytes - plan.budget_bytes)
        assert rejected.reason and (rejected.relative_step_time is None) == (not timed)

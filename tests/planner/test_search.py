from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_toys import GIB, MIB, make_job, toy_answerer

from brim.errors import InvalidStrategy, ProbeFailed
from brim.planner.answerer import Answerer, relative_cost
from brim.planner.batch import exact_splits, is_power_of_two
from brim.planner.candidates import list_variants
from brim.planner.search import Costed, choose, least_peak_bytes, search
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

JOBS = {
    (gpu, trainer, size): make_job(gpu=gpu, trainer=trainer, effective_batch_size=size)
    for gpu in ("rtx-4090", "h100:8")
    for trainer in ("trl", "unsloth", "plain")
    for size in (8, 24, 48, 128, 720)
}
LAWS = st.fixed_dictionaries({
    "base_bytes": st.integers(1, 20).map(lambda gib: gib * GIB),
    "sequence_bytes": st.integers(1, 4000).map(lambda mib: mib * MIB),
    "gradient_bytes": st.integers(0, 8).map(lambda gib: gib * GIB),
    "launch_seconds": st.floats(0.001, 1.0),
    "timed": st.booleans(),
})  # fmt: skip


def brute_force(workload: Workload, answerer: Answerer, budget_bytes: int) -> Strategy | None:
    """Cost every strategy, keep those that fit, and apply the tie rule as it is written in the issue."""
    every = [
        variant.at(micro, steps)
        for variant in list_variants(workload, {})
        for micro, steps in exact_splits(workload.batch.sequences, workload.cluster.num_devices)
    ]
    cost = {
        strategy: answerer.seconds(workload, strategy) or relative_cost(workload, strategy)
        for strategy in every
        if answerer.peak(workload, strategy) <= budget_bytes
    }
    if not cost:
        return None
    ties = [strategy for strategy in cost if cost[strategy] <= 1.03 * min(cost.values())]
    return min(
        ties,
        key=lambda strategy: (
            ("none", "selective", "full").index(strategy.activation_checkpointing),
            strategy.activation_offload,
            answerer.peak(workload, strategy),
            not is_power_of_two(strategy.micro_batch_size),
            -strategy.micro_batch_size,
        ),
    )


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(sorted(JOBS)), law=LAWS, budget=st.integers(1, 80))
def test_search_equals_brute_force(key: tuple[str, str, int], law: dict[str, Any], budget: int) -> None:
    workload, answerer = JOBS[key].workload, toy_answerer(**law)
    found = search(workload, {}, answerer, budget * GIB)
    expected = brute_force(workload, answerer, budget * GIB)
    assert (found.best.strategy if found.best else None) == expected
    assert search(workload, {}, answerer, budget * GIB) == found


@settings(max_examples=100, deadline=None)
@given(key=st.sampled_from(sorted(JOBS)), law=LAWS, budget=st.integers(1, 80))
def test_what_is_found_fits_and_keeps_the_batch(key: tuple[str, str, int], law: dict[str, Any], budget: int) -> None:
    workload, answerer = JOBS[key].workload, toy_answerer(**law)
    found = search(workload, {}, answerer, budget * GIB)
    for costed in found.fitting:
        strategy = costed.strategy
        assert answerer.peak(workload, strategy) == costed.peak_bytes <= budget * GIB
        split = strategy.micro_batch_size * strategy.gradient_accumulation_steps * strategy.mesh.data_parallel_size
        assert split == workload.batch.sequences
    assert all(costed.peak_bytes > budget * GIB for costed in found.over)


@settings(max_examples=60, deadline=None)
@given(key=st.sampled_from(sorted(JOBS)), law=LAWS)
def test_the_least_peak_is_that_of_all(key: tuple[str, str, int], law: dict[str, Any]) -> None:
    workload, answerer = JOBS[key].workload, toy_answerer(**law)
    every = search(workload, {}, answerer, 2**60).fitting
    assert least_peak_bytes(workload, {}, answerer) == min(costed.peak_bytes for costed in every)


def test_the_whole_batch_is_asked_even_when_half_of_it_does_not_fit() -> None:
    # Accumulating keeps gradients through the forward pass: one large micro-batch can need less than two small.
    workload = make_job(effective_batch_size=2, trainer="plain").workload
    answerer = toy_answerer(base_bytes=GIB, sequence_bytes=100 * MIB, gradient_bytes=5 * GIB)
    found = search(workload, {}, answerer, 2 * GIB)
    assert found.best is not None and found.best.strategy.gradient_accumulation_steps == 1


def costed(micro: int, cost: float, peak: int = 10, checkpointing: Any = "none") -> Costed:
    strategy = Strategy(
        micro_batch_size=micro, gradient_accumulation_steps=1, activation_checkpointing=checkpointing
    )
    return Costed(strategy=strategy, peak_bytes=peak, seconds=cost, cost=cost)


def test_ties_prefer_less_checkpointing_then_memory_then_powers_of_two() -> None:
    fast, plain = costed(8, 1.0, 10, "full"), costed(2, 1.02, 20)
    assert choose([fast, plain]) is plain
    assert choose([fast, costed(2, 1.04, 20)]) is fast
    low = costed(3, 1.01, 5)
    assert choose([costed(8, 1.0), low]) is low
    power = costed(4, 1.02)
    assert choose([costed(6, 1.0), power, costed(5, 1.01)]) is power
    assert choose([]) is None


def test_what_is_fixed_stays_fixed() -> None:
    job = make_job(micro_batch_size=2, activation_checkpointing="full", attention_kernel="eager")
    found = search(job.workload, job.fixed, toy_answerer(), 20 * GIB)
    assert found.num_costed == 1 and found.best is not None
    strategy = found.best.strategy
    assert (strategy.micro_batch_size, strategy.gradient_accumulation_steps) == (2, 16)
    assert (strategy.activation_checkpointing, strategy.attention_kernel) == ("full", "eager")


def test_a_fixed_knob_that_no_rule_allows_is_refused_with_its_reason() -> None:
    job = make_job(loss_kernel="dense")
    with pytest.raises(InvalidStrategy, match=r"^trl has no dense loss; it has chunked$"):
        search(job.workload, job.fixed, toy_answerer(), 20 * GIB)


@settings(max_examples=100, deadline=None)
@given(job=st.sampled_from(sorted(JOBS)), law=LAWS, budget=st.integers(2, 80).map(lambda gib: gib * GIB))
def test_asking_only_what_may_win_finds_the_same(job: Any, law: dict[str, Any], budget: int) -> None:
    """Where an answer takes seconds, kinds that cost more than what fits are not asked for."""
    workload, answerer = JOBS[job].workload, toy_answerer(**law)
    sparing = replace(answerer, is_dear=lambda workload: True)
    whole, some = (search(workload, {}, one, budget) for one in (answerer, sparing))
    assert whole.best == some.best
    assert some.num_costed <= whole.num_costed
    assert bool(some.left_out) or some.num_costed == whole.num_costed


def test_kinds_that_cannot_be_answered_are_left_out_and_said() -> None:
    job, answerer = make_job(), toy_answerer()

    def peak(workload: Workload, strategy: Strategy) -> int:
        if strategy.activation_checkpointing != "none":
            raise ProbeFailed("it has no checkpointing")
        return answerer.peak(workload, strategy)

    found = search(job.workload, {}, replace(answerer, peak=peak), 80 * GIB)
    assert found.best is not None and found.best.strategy.activation_checkpointing == "none"
    assert {reason for _, reason in found.left_out} == {"it has no checkpointing"}
    with pytest.raises(ProbeFailed, match="it has no checkpointing"):
        search(job.workload, {"activation_checkpointing": "full"}, replace(answerer, peak=peak), 80 * GIB)

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from planner_toys import make_job

from brim.planner.answerer import Answerer, answer_by_formula, answer_by_rule, relative_cost
from brim.planner.candidates import list_splits, list_variants
from brim.planner.job import Job

JOBS = [
    make_job(model, gpu=gpu, method=method, trainer=trainer)
    for model in ("7B", "gpt2", "mistralai/Mixtral-8x7B-v0.1")
    for gpu in ("24GiB", "h100:8")
    for method in ("full", "qlora")
    for trainer in ("trl", "transformers")
]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), answer=st.sampled_from([answer_by_formula, answer_by_rule]))
def test_the_cheap_halves_equal_the_whole_answer(data: st.DataObject, answer: Callable[[], Answerer]) -> None:
    answerer, job = answer(), data.draw(st.sampled_from(JOBS))
    variant = data.draw(st.sampled_from(list_variants(job.workload, {})))
    strategy = variant.at(*data.draw(st.sampled_from(list_splits(job.workload, {}))))
    estimate = answerer.estimate(job.workload, strategy)
    assert answerer.peak(job.workload, strategy) == estimate.peak_allocated_bytes
    assert answerer.moment(job.workload, strategy) == estimate.peak_moment
    seconds = answerer.seconds(job.workload, strategy)
    assert seconds == (estimate.step_time.step_seconds if estimate.step_time else None)
    assert estimate.source == answerer.source


@settings(max_examples=60, deadline=None)
@given(job=st.sampled_from(JOBS))
def test_a_larger_micro_batch_never_needs_less_while_it_accumulates(job: Job) -> None:
    workload, answerer = job.workload, answer_by_formula()
    splits = [split for split in list_splits(workload, {}) if split[1] > 1]
    for variant in list_variants(workload, {}):
        peaks = [answerer.peak(workload, variant.at(*split)) for split in splits]
        assert peaks == sorted(peaks)


def test_the_stand_in_for_seconds_prefers_less_work_and_more_tokens() -> None:
    job = make_job()
    none, *_, full = list_variants(job.workload, {})
    assert relative_cost(job.workload, none.at(4, 8)) < relative_cost(job.workload, none.at(2, 16))
    assert relative_cost(job.workload, none.at(4, 8)) < relative_cost(job.workload, full.at(4, 8))

from __future__ import annotations

from math import ceil
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from planner_toys import make_job

from brim.cost.ledger import StepTime
from brim.planner.record import Schedule
from brim.planner.schedule import build_schedule
from brim.spec.strategy import Mesh, Strategy

TIME = StepTime(fixed_seconds=1.0, micro_batch_seconds=2.0, step_seconds=17.0, tokens_per_second_per_device=1.0)


def schedule(micro: int = 4, steps: int = 8, time: StepTime | None = None, **options: Any) -> Schedule:
    strategy = Strategy(
        micro_batch_size=micro, gradient_accumulation_steps=steps, mesh=Mesh(dp_replicate=options.pop("ranks", 1))
    )
    return build_schedule(make_job(**options).workload, strategy, time)


def test_the_last_partial_window_counts() -> None:
    plan = schedule(dataset_size=1000, epochs=2)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (32, 64, 2)
    assert (plan.sequences_per_step, plan.tokens_per_step) == (32, 65_536)
    assert "count optimizer steps" in plan.note


def test_an_epoch_takes_its_batches_and_its_steps() -> None:
    assert schedule(time=TIME, dataset_size=1000).epoch_seconds == 250 * 2.0 + 32 * 1.0
    assert schedule(time=None, dataset_size=1000).epoch_seconds is None
    assert schedule(time=TIME).epoch_seconds is None


def test_unknown_stays_unknown() -> None:
    plan = schedule()
    assert plan.num_sequences is plan.steps_per_epoch is plan.total_steps is plan.warmup_steps is None
    assert schedule(dataset_size=1000, packing=True).steps_per_epoch is None


def test_parts_of_an_epoch() -> None:
    assert schedule(dataset_size=3200, epochs=0.25).total_steps == 25


@given(size=st.integers(1, 10**6), micro=st.sampled_from([1, 2, 4, 8]), ranks=st.sampled_from([1, 2, 4]))
def test_steps_are_batches_over_accumulation_rounded_up(size: int, micro: int, ranks: int) -> None:
    plan = schedule(micro, 32 // (micro * ranks) or 1, ranks=ranks, dataset_size=size)
    assert plan.steps_per_epoch == ceil(size / (micro * ranks * (32 // (micro * ranks) or 1)))

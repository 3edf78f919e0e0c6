from __future__ import annotations

import pytest
from planner_toys import make_job

from brim.cost.overhead import context_bytes
from brim.planner.answerer import answer_by_formula, answer_by_rule
from brim.planner.paging import paged_bytes
from brim.planner.plan import plan_workload

PAGED = {"model": "3B", "gpu": "rtx-3090", "method": "full", "seq_len": 512}


@pytest.mark.parametrize("optimizer", ["paged-adamw-32bit", "adamw-8bit"])
def test_paged_states_are_what_is_neither_allocator_nor_context(optimizer: str) -> None:
    job = make_job(**PAGED | {"gpu": "rtx-3090" if optimizer.startswith("paged") else "h100"}, optimizer=optimizer)
    plan = plan_workload(job.workload, job.fixed, answer_by_formula())
    estimate, context = plan.estimate, context_bytes(job.workload.cluster.device)
    paged = paged_bytes(job.workload, estimate)
    assert paged + context + estimate.peak_reserved_bytes == estimate.device_bytes
    assert bool(paged) is optimizer.startswith("paged")
    assert not any(warning.code == "fragmentation" for warning in plan.warnings)


def test_the_rule_knows_no_paging() -> None:
    job = make_job(model="125M", gpu="rtx-3090", optimizer="paged-adamw-32bit")
    plan = plan_workload(job.workload, job.fixed, answer_by_rule())
    assert paged_bytes(job.workload, plan.estimate) == 0

"""What a plan adds to recovery: room to overlap, and the cheapest way out when nothing is left; what counts as one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from recover_toys import FORM, ROOMY, Refuser, build, make_windows

import brim
from brim.devices.capped import CappedMemory
from brim.errors import CannotRecover
from brim.planner.record import Plan
from brim.runtime.recovery import is_roomy
from brim.runtime.restore import is_out_of_memory


@pytest.fixture(scope="module")
def plan() -> Plan:
    return brim.plan("7B", gpu="24GiB", method="lora", micro_batch_size=1, history=False)


def test_ranks_overlap_only_where_the_plan_has_room(plan: Plan) -> None:
    assert not is_roomy(None)
    most = plan.estimate.peak_reserved_bytes + plan.estimate.margin_bytes
    assert is_roomy(replace(plan, capacity_bytes=2 * most))
    assert not is_roomy(replace(plan, capacity_bytes=most + 1))


def test_it_stops_with_the_cheapest_way_out(plan: Plan) -> None:
    model = build()
    model.supports_gradient_checkpointing = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recovery = brim.Recovery(model, optimizer, form=FORM, plan=plan)
    assert recovery.micro_batch_size == 1
    window = make_windows()[0]
    with CappedMemory(ROOMY, refuse=Refuser(30, times=10**9)), pytest.raises(CannotRecover) as caught:
        recovery.step(window)
    assert caught.value.relaxations
    assert f"cheapest way out: {caught.value.relaxations[0]}" in str(caught.value)


def test_out_of_memory_is_a_type_and_a_code() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    if hasattr(torch, "AcceleratorError"):
        for code, found in ((2, True), (700, False)):  # cudaErrorMemoryAllocation, cudaErrorIllegalAddress
            error = torch.AcceleratorError("CUDA error")
            error.error_code = code
            assert is_out_of_memory(error) is found

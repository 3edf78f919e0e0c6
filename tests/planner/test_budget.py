from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from planner_toys import GIB, MIB

from brim.planner.budget import find_budget
from brim.spec.device import Device

CARD = Device(name="card", capacity_bytes=24 * GIB)


@given(
    capacity=st.integers(1, 2**40), free=st.none() | st.integers(0, 2**40), outside=st.integers(0, 2**33),
    margin=st.floats(0, 1),
)  # fmt: skip
def test_the_budget_is_an_int_inside_the_card(capacity: int, free: int | None, outside: int, margin: float) -> None:
    device = Device(name="card", capacity_bytes=capacity, free_bytes=free)
    budget = find_budget(device, outside_bytes=outside, margin_fraction=margin)
    usable = max(0, device.plannable_bytes - outside)
    assert isinstance(budget.budget_bytes, int)
    assert 0 <= budget.budget_bytes * (1 + margin) <= 0.9 * usable + 1
    assert (budget.budget_bytes + 2) * (1 + margin) >= int(0.9 * usable)


def test_the_sentence_shows_the_arithmetic() -> None:
    budget = find_budget(CARD, outside_bytes=500 * MIB, margin_fraction=0.05)
    assert budget.budget_bytes == int((24 * GIB - 500 * MIB) * 90 // 100 / 1.05)
    assert budget.sentence == (
        "budget 20.15 GiB: 90 % of the 23.51 GiB left of 24.00 GiB after the process's own context, "
        "less 5.0% for the error of the estimate"
    )


def test_free_memory_counts_where_known() -> None:
    budget = find_budget(replace(CARD, free_bytes=20 * GIB), outside_bytes=0, margin_fraction=0)
    assert budget.budget_bytes == 18 * GIB and budget.capacity_bytes == 20 * GIB
    assert "20.00 GiB free" in budget.sentence

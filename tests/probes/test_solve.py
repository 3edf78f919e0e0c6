"""Two micro-batches traced give every other one: to the byte, against a trace of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from brim.cost.ledger import Ledger, Moment
from brim.probes.pieces import Event
from brim.probes.solve import SOLVED_AT, Solved, extend_moment, solve
from brim.probes.stream import Traced, list_moments, replay
from brim.probes.trace import trace_step
from real_steps import Case

CASES = {
    "llama, lora, checkpointed": lambda: Case(
        "llama", method="lora", dtype="bf16", attention="sdpa", gradient_accumulation_steps=2,
        activation_checkpointing="full",
    ),
    "qwen3_moe, full": lambda: Case("qwen3_moe", dtype="bf16", attention="sdpa", gradient_accumulation_steps=2),
}  # fmt: skip


def trace_at(case: Case, micro_batch_size: int) -> Traced:
    return trace_step(case.workload, replace(case.strategy, micro_batch_size=micro_batch_size), case.build)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


@pytest.fixture(scope="module")
def solved(case: Case) -> Solved:
    found = solve(*(trace_at(case, size) for size in SOLVED_AT))
    assert found is not None
    return found


def test_a_solved_micro_batch_is_the_traced_one_to_the_byte(case: Case, solved: Solved) -> None:
    whole, known = trace_at(case, 5), solved.trace_at(5)
    assert [event[1:] for event in known.events] == [event[1:] for event in whole.events]
    assert list_moments(known.pieces, known.storages) == list_moments(whole.pieces, whole.storages)
    assert replay(known.pieces) == replay(whole.pieces)


def test_the_largest_within_a_budget_just_fits(solved: Solved) -> None:
    for size in (2, 5, 9):
        assert solved.largest_within(solved.peak_bytes(size)) == size
        assert solved.largest_within(solved.peak_bytes(size) - 1) == size - 1
    assert solved.largest_within(1) == 0


def test_streams_that_differ_in_more_than_sizes_are_not_solved(case: Case) -> None:
    small, large = (trace_at(case, size) for size in SOLVED_AT)
    assert solve(small, replace(large, pieces=large.pieces[:-1])) is None


def test_a_moment_on_the_line_through_two() -> None:
    small, large = (
        Moment(name="loss", ledger=Ledger(parameters=100, activations=10 * size, temporaries=-3 * size + 9))
        for size in SOLVED_AT
    )
    far = extend_moment(small, large, (7, *SOLVED_AT))
    assert far == Moment(name="loss", ledger=Ledger(parameters=100, activations=70, temporaries=0))


def test_frees_in_any_order_are_the_same_stream() -> None:
    case = CASES["llama, lora, checkpointed"]()
    small, large = (trace_at(case, size) for size in SOLVED_AT)
    place, events = next((i, list(piece.events)) for i, piece in enumerate(large.pieces) if _frees_two(piece.events))
    at = _frees_two(events)
    events[at : at + 2] = reversed(events[at : at + 2])
    pieces = [*large.pieces[:place], replace(large.pieces[place], events=events), *large.pieces[place + 1 :]]
    assert solve(small, replace(large, pieces=pieces)) is not None


def _frees_two(events: Sequence[Event]) -> int:
    """Return where two storages are freed one after the other; 0 if nowhere."""
    pairs = enumerate(pairwise(events))
    return next((i for i, (one, other) in pairs if max(one.num_bytes, other.num_bytes) < 0), 0)

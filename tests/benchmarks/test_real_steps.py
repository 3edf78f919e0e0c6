"""The traced step is the real one at every moment, metered by torch.profiler; and the comparison can tell."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from hypothesis import given
from hypothesis import strategies as st

from real_steps import BAR, CASES, Span, compare, frechet_distance, run_case

FAST = ("llama, full, foreach", "gpt_neox, full, foreach", "llama, full, plain loop, checkpointed (reentrant)")


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in FAST)]
)
def test_bytes_at_every_moment_are_those_of_a_real_step(name: str) -> None:
    warnings.simplefilter("ignore")
    found = run_case(name)
    assert found.worst_share <= BAR, found
    assert found.num_unmatched == 0 and found.num_changes > 500


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 15


def make_step(*loss: int) -> list[Span]:
    return [Span("forward", [400_000, 600_000]), Span("loss", list(loss)), Span("backward", [-600_000, -400_000])]


@pytest.mark.parametrize(
    ("loss", "worst", "unmatched"),
    [
        ((50_000, -50_000), 0, 0),
        ((50_000, 300, -300, -50_000), 300, 0),  # a small one inside
        ((-50_000, 50_000), 50_000, 2),  # a dip instead of a spike
        ((60_000, -60_000), 10_000, 4),
        ((), 50_000, 2),
        ((50_000, -50_000, 50_000, -50_000), 50_000, 2),  # twice instead of once
        ((50_000,), 50_000, 1),  # never freed
    ],
)
def test_a_difference_at_one_moment_is_found(loss: tuple[int, ...], worst: int, unmatched: int) -> None:
    found = compare(make_step(50_000, -50_000), make_step(*loss))
    assert (found.worst_bytes, found.num_unmatched) == (worst, unmatched)
    assert found.peak_bytes == 1_050_000


def test_other_phases_are_no_match() -> None:
    with pytest.raises(ValueError, match="phases"):
        compare(make_step(), make_step()[:2])


CURVES = st.lists(st.integers(0, 40), min_size=1, max_size=7)


@given(one=CURVES, other=CURVES)
def test_the_distance_is_the_least_over_all_alignments(one: list[int], other: list[int]) -> None:
    """Against the definition, every alignment tried."""

    def search(index: int, place: int) -> int:
        here = abs(one[index] - other[place])
        if index == place == 0:
            return here
        before = [(index - 1, place), (index, place - 1), (index - 1, place - 1)]
        return max(here, min(search(*cell) for cell in before if min(cell) >= 0))

    assert frechet_distance(one, other) == search(len(one) - 1, len(other) - 1)

"""Weights of a window: shares of the means add up to the mean of the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtime_toys import IGNORED

from brim.losses.form import LossForm
from brim.losses.rules import ROWS, CountingRule
from brim.runtime.ranks import gather_numbers, is_distributed, share_from_first
from brim.runtime.window import Window, open_window

LABELS = CountingRule(key="labels")


def make_batches(counts: list[int]) -> list[dict[str, torch.Tensor]]:
    return [{"labels": torch.tensor([[1] * count + [IGNORED] * (9 - count)])} for count in counts]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_shares_add_up_to_the_mean_of_all_terms(counts: list[int]) -> None:
    batches = make_batches(counts)
    window = open_window(LossForm(rule=LABELS), batches)
    assert (window.counts, window.num_terms, window.num_ranks) == (tuple(counts), sum(counts), 1)
    assert window.num_micro_batches == window.most_micro_batches == len(counts)
    means = [torch.tensor(float(place) + 0.5) for place in range(len(counts))]
    total = sum(float(window.scale(place, mean)) for place, mean in enumerate(means))
    expected = sum(count * float(mean) for count, mean in zip(counts, means, strict=True)) / max(sum(counts), 1)
    assert total == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_average_over_ranks_is_the_mean_of_all_terms(ranks: list[list[int]]) -> None:
    form = LossForm(rule=LABELS, auxiliary=(("aux_loss", 0.5),))
    total, number, shares = sum(map(sum, ranks)), sum(map(len, ranks)), 0.0
    for counts in ranks:
        window = Window(
            form=form, counts=tuple(counts), num_terms=total, num_micro_batches=number,
            most_micro_batches=max(map(len, ranks)), num_ranks=len(ranks),
        )  # fmt: skip
        for place in range(window.most_micro_batches):
            shares += float(window.scale(place, torch.tensor(3.0 + 0.5 * 4.0), {"aux_loss": torch.tensor(4.0)}))
    assert shares / len(ranks) == pytest.approx((3.0 if total else 0.0) + 0.5 * 4.0, rel=1e-6)


def test_a_sum_is_weighted_by_nothing_but_ranks() -> None:
    window = open_window(LossForm(rule=ROWS, reduction="sum"), make_batches([1, 5]))
    assert [float(window.scale(place, torch.tensor(7.0))) for place in range(3)] == [7.0, 7.0, 0.0]


def test_micro_batches_without_terms_get_one_and_no_weight() -> None:
    batches = make_batches([0, 4])
    window = open_window(LossForm(rule=LABELS), batches)
    assert int(LABELS.count(window.prepare(0, batches[0]))) == 1
    assert window.weigh(0) == 0.0
    assert window.prepare(1, batches[1]) is batches[1]
    assert int(LABELS.count(batches[0])) == 0  # the caller's own is as it was


def test_a_repeated_micro_batch_without_terms_gets_one_too() -> None:
    """0 x NaN is NaN: the rank with fewer micro-batches may end on one without a label."""
    batches = make_batches([4, 0])
    window = open_window(LossForm(rule=LABELS), batches)
    assert int(LABELS.count(window.prepare(2, batches[1]))) == 1
    assert window.prepare(2, batches[0]) is batches[0]


def test_an_empty_window_has_no_terms() -> None:
    window = open_window(LossForm(rule=LABELS), [])
    assert (window.num_terms, window.most_micro_batches) == (0, 0)


def test_without_a_process_group_there_is_one_rank() -> None:
    assert not is_distributed()
    assert gather_numbers([1, 2.5]) == [[1, 2.5]]
    value = object()
    assert share_from_first(value) is value

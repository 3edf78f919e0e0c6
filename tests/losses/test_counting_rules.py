"""Counting rules: what they count, in which order they are tried, and what is put where nothing counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from brim.losses.rules import ROWS, CountingRule, count_rows, is_target, list_rules

LABELS = st.integers(1, 5).flatmap(
    lambda width: st.lists(
        st.lists(st.sampled_from([-100, 0, 7]), min_size=width, max_size=width), min_size=2, max_size=6
    )
)


@given(LABELS, st.integers(1, 5))
def test_counts_of_parts_add_up(labels: list[list[int]], cut: int) -> None:
    whole = {"labels": torch.tensor(labels), "loss_mask": (torch.tensor(labels) == 7).long()}
    parts = [{key: part for key, part in zip(whole, values, strict=True)} for values in
             zip(*(value.split(cut) for value in whole.values()), strict=True)]  # fmt: skip
    for rule in list_rules(whole, ignored=(0,)):
        assert sum(int(rule.count(part)) for part in parts) == int(rule.count(whole))


@given(LABELS)
def test_a_term_is_added_without_touching_the_batch(labels: list[list[int]]) -> None:
    for ignored in (-100, 0):
        inputs = {"labels": torch.full_like(torch.tensor(labels), ignored)}
        for rule in list_rules(inputs, ignored=(ignored,)):
            if rule.key and rule.ignored == ignored and (not rule.shifted or inputs["labels"].shape[1] > 1):
                assert int(rule.count(rule.add_term(inputs))) == 1
        assert inputs["labels"].eq(ignored).all()


def test_rules_are_listed_likeliest_first() -> None:
    inputs = {"input_ids": torch.ones(2, 4).long(), "labels": torch.ones(2, 4).long()}
    assert [str(rule) for rule in list_rules(inputs)] == ["labels[..., 1:] != -100", "labels != -100", "rows"]
    one_dim = {"labels": torch.ones(2).long(), "completion_mask": torch.ones(2, 3)}
    assert [str(rule) for rule in list_rules(one_dim, ignored=(5,))] == [
        "labels != -100", "completion_mask[..., 1:] != 0", "completion_mask != 0", "rows", "labels != 5",
    ]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("labels", torch.ones(2).long(), True),
    ("labels", torch.ones(2), False),
    ("labels", torch.ones(2).bool(), False),
    ("labels", torch.tensor(3), False),
    ("input_ids", torch.ones(2).long(), False),
    ("next_sentence_label", torch.ones(2).long(), True),
    ("labels", [1, 2], False),
])  # fmt: skip
def test_targets_are_whole_numbers(key: str, value: Any, expected: bool) -> None:
    assert is_target(key, value) is expected


@pytest.mark.parametrize(("inputs", "expected"), [
    ({"pixel_values": torch.ones(9, 3), "labels": torch.ones(2, 4)}, 2),
    ({"scale": torch.tensor(1.0), "input_ids": torch.ones(3, 4)}, 3),
    ({"anything": torch.ones(5, 1)}, 5),
    ({"number": 4}, 1),
])  # fmt: skip
def test_rows_are_counted_where_labels_are(inputs: dict[str, Tensor], expected: int) -> None:
    assert count_rows(inputs) == int(ROWS.count(inputs)) == expected
    assert ROWS.add_term(inputs) == inputs or any(isinstance(value, Tensor) for value in inputs.values())


def test_a_missing_input_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        CountingRule(key="labels").count({"input_ids": torch.ones(2)})

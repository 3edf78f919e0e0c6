"""The batches that a loss is measured on tell counting rules apart."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from brim.losses.rules import ROWS, list_rules
from brim.losses.views import split_labels, split_rows, vary_labels

DRAWN = st.tuples(st.integers(1, 4), st.integers(6, 12), st.integers(0, 2), st.integers(0, 99))


def make_batch(rows: int, width: int, prompt: int, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 9, (rows, width), generator=draw)
    labels[:, :prompt] = -100
    return {"input_ids": labels.clamp(min=0), "labels": labels}


@given(DRAWN)
def test_every_rule_counts_another_number_in_some_variant(drawn: tuple[int, int, int, int]) -> None:
    batch = make_batch(*drawn)
    kept = batch["labels"].clone()
    variants = list(vary_labels(batch))
    counted = [tuple(int(rule.count(one)) for one in variants) for rule in list_rules(batch)]
    assert len(set(counted)) == len(counted)
    assert torch.equal(batch["labels"], kept)


@given(DRAWN)
def test_labels_are_split_without_overlap(drawn: tuple[int, int, int, int]) -> None:
    parts = split_labels(make_batch(*drawn))
    assert parts is not None
    whole, first, second = (part["labels"].ne(-100) for part in parts.batches)
    assert torch.equal(whole, first | second) and not (first & second).any()
    assert first.any() and second.any() and first[:, 0].any() and not second[:, 0].any()


def test_short_rows_are_not_split_by_labels() -> None:
    assert split_labels({"labels": torch.tensor([[1, 2], [3, 4]])}) is None
    assert split_labels({"labels": torch.tensor([1, 2, 3])}) is None
    assert split_labels({"input_ids": torch.ones(2, 9).long()}) is None


@given(st.integers(2, 9))
def test_rows_are_cut_alone_and_in_stacked_pairs(rows: int) -> None:
    batch = {"input_ids": torch.arange(rows)[:, None], "name": "x", "table": torch.ones(100, 2)}
    trials = list(split_rows(batch))
    for parts in trials:
        seen = [part["input_ids"].flatten().tolist() for part in parts.batches]
        assert sorted(seen[1] + seen[2]) == seen[0] == list(range(rows))
        assert int(ROWS.count(parts.first)) + int(ROWS.count(parts.second)) == rows
        assert parts.first["table"].shape == (100, 2) and parts.first["name"] == "x"
    if rows % 2 == 0 and rows > 2:
        half = rows // 2
        stacked = next(parts for parts in trials if parts.layout == "rows in 2")
        assert {row % half for row in stacked.first["input_ids"].flatten().tolist()}.isdisjoint(
            row % half for row in stacked.second["input_ids"].flatten().tolist()
        )

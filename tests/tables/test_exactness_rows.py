"""The table of exactness is read by class and loop, the newest release first."""

from __future__ import annotations

from brim.tables.exactness import find_exactness


def test_the_newest_release_is_found() -> None:
    row = find_exactness("T5ForConditionalGeneration", "hf")
    assert row is not None
    assert not row.exact
    assert row.error > 1
    assert tuple(int(part) for part in row.transformers.split(".")) > (5, 0)


def test_what_nobody_measured_is_none() -> None:
    assert find_exactness("NoSuchForCausalLM", "hf") is None
    assert find_exactness("T5ForConditionalGeneration", "sft") is None


def test_a_class_is_not_taken_for_another_that_begins_alike() -> None:
    row = find_exactness("BertForSequenceClassification", "hf")
    assert row is not None and row.architecture == "BertForSequenceClassification"

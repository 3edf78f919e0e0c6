"""Which tensors a setting implies: masks of padded and of packed micro-batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from time_jobs import job, way

from brim.cost.estimate import estimate, peak_bytes
from brim.cost.setting import is_flattened, is_masked, read_setting
from brim.errors import UnsupportedModel
from brim.spec.recipe import Engine, Preference
from brim.spec.workload import Workload


def packed(flattens: bool) -> Workload:
    """Return a packed LoRA job whose trainer lays sequences end to end, or does not."""
    return job(method="lora", seq_len=1024, engine=Engine(name="trl", flattens_packed=flattens))


def padded() -> Workload:
    """Return the same job with sequences of different lengths."""
    workload = packed(True)
    return replace(workload, data=replace(workload.data, packing=False))


def test_full_sequences_of_their_own_rows_need_no_mask() -> None:
    """Packing that keeps one sequence a row builds no mask."""
    assert not is_masked(packed(False), way(4, attention_kernel="sdpa"))


def test_sequences_that_share_a_row_are_masked_over_the_whole_row() -> None:
    """Best-fit packing makes one row of the micro-batch: every query has a mask entry for every token of it."""
    strategy = way(4, attention_kernel="sdpa")
    assert is_flattened(packed(True), strategy)
    assert read_setting(packed(True), strategy).attended_len == 4 * 1024


def test_the_mask_of_a_shared_row_grows_with_the_square_of_the_micro_batch() -> None:
    """SDPA keeps an additive mask a layer; flash attention reads the boundaries and keeps none."""
    extra = [
        peak_bytes(packed(True), way(micro, attention_kernel="sdpa"))
        - peak_bytes(packed(False), way(micro, attention_kernel="sdpa"))
        for micro in (2, 4)
    ]
    masks = [32 * 2 * (micro * 1024) ** 2 for micro in (2, 4)]
    assert extra[0] > masks[0] and extra[1] > masks[1]
    assert extra[1] - 2 * extra[0] > 0.9 * (masks[1] - 2 * masks[0])
    assert peak_bytes(packed(True), way(4)) == peak_bytes(packed(False), way(4))


def test_padding_masks_only_micro_batches_of_several_sequences() -> None:
    """A single sequence is never padded."""
    one, two = way(1, attention_kernel="sdpa"), way(2, attention_kernel="sdpa")
    assert not is_masked(padded(), one) and is_masked(padded(), two)
    assert any("mask" in note for note in estimate(padded(), two).notes)
    assert not any("mask" in note for note in estimate(padded(), one).notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"preference": Preference()}, "pairs of answers"), ({"method": "prefix-tuning"}, "prefix-tuning")],
)
def test_what_the_formula_does_not_know_it_refuses(change: dict[str, Any], words: str) -> None:
    workload = job(method="full", seq_len=1024)
    unknown = replace(workload, recipe=replace(workload.recipe, **change))
    with pytest.raises(UnsupportedModel, match=f"{words} of .* use --by trace"):
        estimate(unknown, way(1))

"""Sequences that share a row: inputs against TRL's collator, masks against the formula and transformers."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch

from brim.cost.estimate import estimate
from brim.errors import ProbeFailed
from brim.probes.follow import follow_step
from brim.probes.rows import flatten, row_masks, shares_rows
from brim.probes.trace import trace
from brim.spec.recipe import Engine
from real_steps import BATCH, LENGTH, Case

PACKS = Engine(name="trl", flattens_packed=True)
ROW = BATCH * LENGTH


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def row_case(attention: str = "sdpa", **knobs: Any) -> Case:
    return Case("llama", engine=PACKS, dtype="bf16", attention=attention, **knobs)


def shapes(case: Case) -> set[tuple[int, ...]]:
    tracker, _ = follow_step(case.workload, case.strategy, case.build)
    return {storage.shape for storage in tracker.storages.values()}


def test_inputs_are_those_of_trls_collator() -> None:
    collators = pytest.importorskip("trl.trainer.sft_trainer")
    collate = collators.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    theirs = collate([{"input_ids": [0] * LENGTH} for _ in range(BATCH)])
    case = row_case()
    ours = flatten(case.make_inputs, case.workload, case.strategy, case.build())()
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype), name
        else:
            assert ours[name] == value, name
    for name in ("position_ids", "cu_seq_lens_q", "seq_idx"):
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_the_formula_agrees_on_shared_rows(attention: str) -> None:
    case = row_case(attention)
    traced = trace(case.workload, case.strategy, case.build)
    told = {one.name: one.total_bytes for one in estimate(case.workload, case.strategy).moments}
    for moment in traced.moments:
        assert moment.total_bytes == pytest.approx(told[moment.name], rel=0.01), moment.name


def test_masks_span_the_row_with_sdpa_and_are_none_with_flash() -> None:
    assert (1, 1, ROW, ROW) in shapes(row_case())
    assert not any(len(one) == 4 and one[-2:] == (ROW, ROW) for one in shapes(row_case("flash")))


def test_sequences_with_rows_of_their_own_have_no_mask() -> None:
    """Whether positions start anew is data; transformers takes tensors without data for packed ones."""
    case = Case("llama", dtype="bf16", attention="sdpa")
    assert not shares_rows(case.workload, case.strategy)
    assert not any(len(one) == 4 and one[-2:] == (LENGTH, LENGTH) for one in shapes(case))


def test_a_lone_sequence_without_padding_shares_its_row_with_none() -> None:
    case = Case("llama", dtype="bf16", attention="sdpa", padding_free=True, micro_batch_size=1)
    case.workload = replace(case.workload, data=replace(case.workload.data, packing=False))
    assert not any(len(one) == 4 and one[-2:] == (LENGTH, LENGTH) for one in shapes(case))


def test_functions_are_put_back() -> None:
    from transformers import masking_utils

    case = row_case("flash")
    before = masking_utils.find_packed_sequence_indices, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(RuntimeError), row_masks(case.workload, case.strategy):
        assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not before[1]
        raise RuntimeError
    after = masking_utils.find_packed_sequence_indices, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    assert before == after


def test_what_cannot_share_a_row_is_refused() -> None:
    case, model = row_case(), Case("bloom").build()
    with pytest.raises(ProbeFailed, match="BloomForCausalLM takes no position_ids"):
        flatten(case.make_inputs, case.workload, case.strategy, model)
    images = flatten(lambda: {**case.make_inputs(), "pixel_values": torch.zeros(1)}, case.workload, case.strategy,
                     case.build())  # fmt: skip
    with pytest.raises(ProbeFailed, match="sequences with pixel_values cannot share a row"):
        images()

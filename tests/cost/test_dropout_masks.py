"""Dropout on tapes: one byte an element where the fraction is above 0, and nothing inside fused attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from time_jobs import job, read_card, way

from brim.cost import modeling
from brim.cost.blocks import cost_layer
from brim.cost.dropout_masks import drop_out, embedding_masks
from brim.cost.estimate import estimate
from brim.cost.setting import Setting, read_setting
from brim.cost.tape import ZERO, Size, Tape, Tensor, per_token, run_forward
from brim.spec.model import Dropout
from brim.spec.workload import Workload

NONE = Dropout()


def dropping(model: str, dropout: Dropout, **words: Any) -> tuple[Workload, Setting]:
    """Return a job whose model drops out, and its setting."""
    workload = job(model=model)
    workload = replace(workload, model=replace(read_card(model), dropout=dropout))
    return workload, read_setting(workload, way(**({"attention_kernel": "sdpa"} | words)))


def kept_by_layer(model: str, dropout: Dropout, **words: Any) -> Size:
    """Return what the first layer keeps."""
    workload, setting = dropping(model, dropout, **words)
    return cost_layer(workload.model.groups[0], setting, "none").kept


def test_a_mask_is_kept_and_the_result_is_new() -> None:
    tape, x = Tape(), Tensor("x", per_token(20))
    assert drop_out(tape, x, 10, 0.0) is x and not tape.ops
    dropped = drop_out(tape, x, 10, 0.1)
    assert dropped.size == x.size
    tape.op("next", [dropped], per_token(1))
    assert run_forward(tape, [x], keeps=True).kept == per_token(10)


@pytest.mark.parametrize(
    ("model", "place", "more"),
    [
        ("gpt2", "hidden_dropout", 2 * 768),  # a mask in each branch
        ("gpt2", "attention_dropout", 0),  # fused attention keeps its seed
        ("gpt2", "activation_dropout", 3072),  # GELU written out keeps two factors, not the product that is dropped out
        ("google-bert/bert-base-uncased", "hidden_dropout", 2 * 768),
        ("google-t5/t5-base", "activation_dropout", 3 * 3072),  # ReLU keeps its own output
        ("EleutherAI/pythia-1b", "hidden_dropout", 2 * 2048),  # parallel branches drop out apart
    ],
)
def test_a_layer_keeps_a_byte_an_element_more(model: str, place: str, more: int) -> None:
    found = kept_by_layer(model, Dropout(**{place: 0.1})) - kept_by_layer(model, NONE)
    assert found == per_token(more)


def test_eager_attention_keeps_a_mask_of_every_score() -> None:
    """12 heads x 2,048 scores a token; under bf16 weights the softmax's own result is kept beside what is dropped."""
    some, none = (
        kept_by_layer("gpt2", Dropout(attention_dropout=fraction), attention_kernel="eager") for fraction in (0.1, 0)
    )
    scores = 12 * 2048
    assert some - none == per_token((1 + 2) * scores)


def test_embeddings_keep_a_mask_in_each_stack_if_they_train() -> None:
    some = Dropout(embedding_dropout=0.1)
    for model, masks in (("gpt2", 768), ("google-t5/t5-base", 2 * 768), ("google/vit-base-patch16-224", 768)):
        workload, setting = dropping(model, some)
        assert embedding_masks(workload.model, setting) == per_token(masks)
        assert embedding_masks(workload.model, replace(setting, trains_base=False)) == ZERO
        assert embedding_masks(workload.model, replace(setting, dropout=NONE)) == ZERO


def test_a_decoder_beside_an_encoder_sees_no_padding_mask() -> None:
    """Collators mask the encoder's input only: T5's own bias is laid out once for all sequences of the decoder."""
    workload, setting = dropping("google-t5/t5-base", NONE)
    decoder = next(group for group in workload.model.groups if group.cross_attention is not None)
    padded = replace(setting, masked=True)
    kept = cost_layer(decoder, padded, "none").kept - cost_layer(decoder, setting, "none").kept
    assert kept == per_token(2 * 12 * 2048)  # the cross-attention's bias, per sequence


def test_t5_fills_its_cache_while_it_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of both attentions of 12 layers, 768 columns each in 16 bit, are there with the logits."""
    totals = []
    for code in (modeling._T5, replace(modeling._T5, keeps_cache=False)):
        monkeypatch.setitem(modeling._MODELING, "t5", code)
        workload, _ = dropping("google-t5/t5-base", NONE)
        evaluation = next(one for one in estimate(workload, way()).moments if one.name == "evaluation")
        totals.append(evaluation.total_bytes)
    assert totals[0] - totals[1] == 4 * 2048 * 12 * 2 * 2 * 2 * 768

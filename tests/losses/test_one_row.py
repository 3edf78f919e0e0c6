"""What a loss averages over, measured on a micro-batch of a single row."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

torch = pytest.importorskip("torch")

from brim.losses.measure import measure_form  # noqa: E402
from brim.losses.views import repeat_row  # noqa: E402


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_sum_over_one_row_is_not_taken_for_a_mean(reduction: str) -> None:
    model = torch.nn.Linear(3, 4)

    def loss_of(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scores = model(inputs["input_values"])
        return torch.nn.functional.cross_entropy(scores, inputs["labels"], reduction=reduction)

    batch = {"input_values": torch.rand(1, 3), "labels": torch.tensor([2])}
    assert measure_form(loss_of, model, batch).reduction == reduction


def test_only_rows_are_repeated() -> None:
    twice = repeat_row({"labels": torch.tensor([[1, 2]]), "edges": torch.tensor([0, 2]), "longest": 2})
    assert twice["labels"].tolist() == [[1, 2], [1, 2]]
    assert twice["edges"].tolist() == [0, 2] and twice["longest"] == 2


@pytest.mark.parametrize("rows", [1, 3])
def test_a_loss_over_what_attention_sees_counts_the_mask(rows: int) -> None:
    model = torch.nn.Embedding(8, 1)

    def loss_of(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        kept = inputs["attention_mask"] == 1
        scores = model(inputs["input_ids"]).squeeze(-1)[kept]
        return torch.nn.functional.binary_cross_entropy_with_logits(scores, inputs["labels"][kept].float())

    ids = torch.randint(0, 8, (rows, 5))
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])[:rows]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": (ids % 2).masked_fill(mask == 0, -100)}
    assert str(measure_form(loss_of, model, batch)) == "mean over attention_mask != 0"


def test_transcripts_of_two_letters_are_counted_by_rows() -> None:
    model = torch.nn.Linear(3, 6)

    def loss_of(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scores = model(inputs["input_values"]).log_softmax(-1).transpose(0, 1)
        labels, rows = inputs["labels"].clamp(min=0), len(inputs["labels"])
        lengths = torch.full((rows,), scores.shape[0]), torch.full((rows,), labels.shape[1])
        return torch.nn.functional.ctc_loss(scores, labels, *lengths)

    batch = {"input_values": torch.rand(1, 9, 3), "labels": torch.tensor([[2, 3]])}
    assert str(measure_form(loss_of, model, batch)) == "mean over rows"

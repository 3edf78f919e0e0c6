"""Two passes give the gradient of the whole batch's contrastive loss; accumulating micro-batch losses does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtime_toys import EXACT, differ, read_gradient
from torch import Tensor, nn

from brim.errors import InseparableLoss, InvalidInput
from brim.runtime.contrastive import accumulate_contrastive


class Tower(nn.Module):
    def __init__(self, wide: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(wide, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))

    def forward(self, values: Tensor) -> Tensor:
        return F.normalize(self.body(values), dim=-1)


class Clip(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.text, self.image = Tower(5, dropout), Tower(7, dropout)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.text(text), self.image(image)

    def find_loss(self, text: Tensor, image: Tensor) -> Tensor:
        scores = text @ image.T * self.temperature.exp()
        target = torch.arange(len(text))
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def build_clip(**settings: Any) -> Clip:
    torch.manual_seed(0)
    return Clip(**settings)


def make_pairs(rows: int = 10) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"text": torch.randn(rows, 5, generator=draw), "image": torch.randn(rows, 7, generator=draw)}


def find_truth(model: Clip, pairs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    loss = model.find_loss(*model(**pairs))
    loss.backward()
    gradient = read_gradient(model)
    model.zero_grad()
    return loss.detach(), gradient


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_gradient_is_that_of_the_whole_batch(size: int) -> None:
    model, pairs = build_clip(), make_pairs()
    expected, truth = find_truth(model, pairs)
    loss = accumulate_contrastive(pairs, size, model=model, encode=lambda part: model(**part), loss=model.find_loss)
    assert torch.allclose(loss, expected) and not loss.requires_grad
    assert differ(read_gradient(model), truth) <= EXACT


def test_mean_of_micro_batch_losses_is_off() -> None:
    model, pairs = build_clip(), make_pairs()
    _, truth = find_truth(model, pairs)
    for start in range(0, 10, 5):
        (model.find_loss(*model(**{key: value[start : start + 5] for key, value in pairs.items()})) / 2).backward()
    assert differ(read_gradient(model), truth) > 0.05


def test_encoders_may_have_their_own_batches() -> None:
    torch.manual_seed(0)
    towers = [Tower(5), Tower(7)]
    queries, passages = {"values": torch.randn(6, 5)}, {"values": torch.randn(18, 7)}

    def find_loss(query: Tensor, passage: Tensor) -> Tensor:
        return F.cross_entropy(query @ passage.T * 5, torch.arange(len(query)) * 3)

    find_loss(towers[0](**queries), towers[1](**passages)).backward()
    truth = [read_gradient(tower) for tower in towers]
    for tower in towers:
        tower.zero_grad()
    encoders = [lambda part: towers[0](**part), lambda part: towers[1](**part)]
    accumulate_contrastive([queries, passages], [2, 5], model=towers, encode=encoders, loss=find_loss)
    assert [differ(read_gradient(tower), one) <= EXACT for tower, one in zip(towers, truth, strict=True)] == [True] * 2


def test_dropout_draws_the_same_in_both_passes() -> None:
    model, pairs = build_clip(dropout=0.5), make_pairs()
    parts = [{key: value[start : start + 4] for key, value in pairs.items()} for start in (0, 4, 8)]
    torch.manual_seed(7)
    embeddings = [model(**part) for part in parts]
    model.find_loss(*(torch.cat(column) for column in zip(*embeddings, strict=True))).backward()
    truth, following = read_gradient(model), torch.rand(())
    model.zero_grad()
    torch.manual_seed(7)
    accumulate_contrastive(pairs, 4, model=model, encode=lambda part: model(**part), loss=model.find_loss)
    assert differ(read_gradient(model), truth) <= EXACT
    assert torch.rand(()) == following  # the second pass draws nothing anew


def test_gradients_add_up_and_are_scaled() -> None:
    class Scaler:
        def scale(self, loss: Tensor) -> Tensor:
            return loss * 8

    model, pairs = build_clip(), make_pairs()
    _, truth = find_truth(model, pairs)
    for _ in range(2):
        accumulate_contrastive(
            pairs, 3, model=model, encode=lambda part: model(**part), loss=model.find_loss, scaler=Scaler()
        )
    assert differ(read_gradient(model), truth * 16) <= EXACT


def test_what_cannot_be_done_is_refused() -> None:
    model, pairs = build_clip(), make_pairs()
    settings: dict[str, Any] = {"model": model, "encode": lambda part: model(**part), "loss": model.find_loss}
    with pytest.raises(InvalidInput, match="2 batches, 3 micro-batch sizes"):
        accumulate_contrastive([pairs, pairs], [1, 2, 3], **settings)
    with pytest.raises(InvalidInput, match="micro_batch_size"):
        accumulate_contrastive(pairs, 0, **settings)
    with pytest.raises(InvalidInput, match="one row per sequence"):
        accumulate_contrastive(pairs, 5, **{**settings, "encode": lambda part: model(**part)[0].sum()})
    model.norm = nn.BatchNorm1d(8)
    with pytest.raises(InseparableLoss, match="batch-norm"):
        accumulate_contrastive(pairs, 5, **settings)

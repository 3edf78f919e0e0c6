"""The tap sees what torch's own loss functions average over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brim.losses.tap import LossTap

SCORES, TARGET = torch.randn(6, 4), torch.tensor([0, 1, -100, 3, 2, 2])
WEIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(("make", "terms"), [
    (lambda: F.cross_entropy(SCORES, TARGET), 5),
    (lambda: nn.CrossEntropyLoss()(SCORES, TARGET), 5),
    (lambda: F.cross_entropy(SCORES, TARGET, reduction="sum"), 5),
    (lambda: F.cross_entropy(SCORES, TARGET, reduction="none").sum(), 5),
    (lambda: F.cross_entropy(SCORES, TARGET.clamp(min=0), ignore_index=2), 4),
    (lambda: F.cross_entropy(SCORES, TARGET, weight=WEIGHT), 13),
    (lambda: F.cross_entropy(SCORES, TARGET, label_smoothing=0.1), 5),
    (lambda: F.cross_entropy(SCORES, SCORES.softmax(-1)), 6),
    (lambda: F.nll_loss(SCORES.log_softmax(-1), TARGET), 5),
    (lambda: F.mse_loss(SCORES, SCORES + 1), 24),
    (lambda: F.l1_loss(SCORES, SCORES + 1), 24),
    (lambda: F.binary_cross_entropy_with_logits(SCORES, SCORES.sigmoid()), 24),
    (lambda: F.ctc_loss(torch.randn(8, 3, 5).log_softmax(-1), torch.ones(3, 2).long(),
                        torch.tensor([8, 8, 8]), torch.tensor([2, 2, 1])), 3),
])  # fmt: skip
def test_terms_are_counted(make: Callable[[], Tensor], terms: float) -> None:
    with LossTap() as tap:
        loss = make()
    (call,) = tap.calls
    assert call.num_terms == terms
    summed = float(loss) > 2 * call.value  # reduction sum, or none and then sum
    assert call.value == pytest.approx(float(loss) / (terms if summed else 1), rel=1e-5)


def test_nothing_is_seen_outside() -> None:
    with LossTap() as tap:
        SCORES.mean()
    F.cross_entropy(SCORES, TARGET)
    assert tap.calls == []


def test_sixteen_bit_is_seen_whoever_asks_for_it() -> None:
    layer = nn.Linear(4, 4)
    with LossTap() as tap:
        layer(SCORES)
    assert not tap.is_coarse
    with LossTap() as tap, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(SCORES)
    assert tap.is_coarse

"""A plain loop takes the big batch's step however the batch is cut, and the stock loop does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtime_toys import EXACT, build_llama, build_mixtral, cut, differ, make_rows, read_gradient, stack, train_whole
from torch import Tensor, nn

from brim.errors import InseparableLoss, InvalidInput
from brim.losses.form import LossForm
from brim.losses.rules import CountingRule
from brim.runtime import accumulate as module
from brim.runtime.accumulate import accumulate, identify_loss

ROWS = make_rows((4, 12, 12, 5, 12, 3, 9), unlabelled=(2,))


def run_step(model: Any, batch: Any, size: int | None = None, **settings: Any) -> Tensor:
    for micro in accumulate(batch, size, model=model, **settings):
        micro.backward(model(**micro.inputs).loss)
    return read_gradient(model)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
def test_gradient_is_that_of_the_big_batch(size: int) -> None:
    model = build_llama()
    truth = train_whole(model, stack(ROWS))
    assert differ(run_step(model, stack(ROWS), size), truth) <= EXACT


def test_the_stock_loop_is_off() -> None:
    model = build_llama()
    truth = train_whole(model, stack(ROWS))
    batches = cut(ROWS, 2)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    assert differ(read_gradient(model), truth) > 0.05


def test_micro_batches_may_be_ragged() -> None:
    model = build_llama()
    truth = train_whole(model, stack(ROWS))
    ragged = [stack(ROWS[:1]), stack(ROWS[1:5]), stack(ROWS[5:])]
    ragged[0] = {key: value[:, :6] for key, value in ragged[0].items()}  # 4 tokens in it, so nothing is lost
    assert differ(run_step(model, ragged), truth) <= EXACT


def test_shares_add_up_to_the_loss() -> None:
    model = build_llama()
    expected = float(model(**stack(ROWS)).loss.detach())
    shares = []
    for micro in accumulate(stack(ROWS), 2, model=model):
        micro.backward(model(**micro.inputs).loss)
        shares.append(float(micro.loss))
    assert sum(shares) == pytest.approx(expected, rel=1e-6) and len(shares) == 4


def test_a_scaler_gets_the_share() -> None:
    class Scaler:
        def scale(self, loss: Tensor) -> Tensor:
            return loss * 1024

    model = build_llama()
    truth = train_whole(model, stack(ROWS))
    for micro in accumulate(stack(ROWS), 2, model=model):
        micro.backward(model(**micro.inputs).loss, scaler=Scaler())
    assert differ(read_gradient(model) / 1024, truth) <= EXACT


def test_a_given_form_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_form", None)
    model = build_llama()
    truth = train_whole(model, stack(ROWS))
    form = LossForm(rule=CountingRule(key="labels", shifted=True))
    assert differ(run_step(model, stack(ROWS), 2, form=form), truth) <= EXACT


def test_the_form_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, measured = build_llama(), []
    theirs = module.measure_form
    monkeypatch.setattr(module, "measure_form", lambda *args, **more: measured.append(1) or theirs(*args, **more))
    for _ in range(3):
        run_step(model, stack(ROWS), 2, loss=lambda inputs: model(**inputs).loss)
    assert len(measured) == 1


def test_losses_are_told_apart_by_what_they_do() -> None:
    def make(reduction: str) -> Any:
        return lambda inputs: reduction

    assert identify_loss(make("sum")) == identify_loss(make("sum"))
    assert identify_loss(make("sum")) != identify_loss(make("mean"))
    assert identify_loss(lambda inputs: 1) != identify_loss(lambda inputs: 2)
    assert identify_loss(None) != identify_loss(make("sum"))


def test_auxiliary_losses_are_averaged_over_micro_batches() -> None:
    model = build_mixtral()
    micro = cut(ROWS, 2)
    model.config.output_router_logits = False
    plain = train_whole(model, stack(ROWS))
    model.config.output_router_logits = True
    torch.stack([model(**batch).aux_loss * 0.5 / len(micro) for batch in micro]).sum().backward()
    truth = plain + read_gradient(model)
    model.zero_grad()
    assert differ(run_step(model, micro), truth) <= EXACT
    assert not model._forward_hooks


def test_a_loop_that_breaks_leaves_nothing_behind() -> None:
    model = build_mixtral()
    for _ in (steps := accumulate(stack(ROWS), 2, model=model)):
        break
    steps.close()
    assert not model._forward_hooks


class Wrapped(nn.Module):
    """What FSDP2 and DDP look like from outside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def set_requires_gradient_sync(self, value: bool) -> None:
        self.seen.append(value)


@pytest.mark.parametrize(("each", "expected"), [(False, [False, False, False, True]), (True, [True] * 4)])
def test_gradients_are_reduced_with_the_last_micro_batch_or_each(each: bool, expected: list[bool]) -> None:
    wrapped = Wrapped(build_llama())
    run_step(wrapped, stack(ROWS), 2, reduce_each=each)
    assert wrapped.seen == expected


def test_nothing_else_of_the_model_changes() -> None:
    model = build_llama().train()
    model.model.layers[0].eval()
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    run_step(model, stack(ROWS), 2)
    assert torch.rand(()) == expected
    assert model.training and not model.model.layers[0].training and not model._forward_hooks


def test_what_cannot_be_meant_is_refused() -> None:
    model = build_llama()
    for batch, size in ((stack(ROWS), None), (stack(ROWS), 0), (stack(ROWS), True), (cut(ROWS, 2), 2), ([], None)):
        with pytest.raises(InvalidInput):
            next(accumulate(batch, size, model=model))
    with pytest.raises(InvalidInput, match="no loss"):
        next(accumulate({"input_ids": stack(ROWS)["input_ids"]}, 2, model=model))
    linear = nn.Linear(3, 2)
    with pytest.raises(InseparableLoss):
        next(accumulate({"inputs": torch.randn(6, 3)}, 2, model=linear, loss=lambda part: linear(part["inputs"]).var()))

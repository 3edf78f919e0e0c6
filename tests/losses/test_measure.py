"""What a loss averages over is found on small models whose losses are made in every usual way."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brim.errors import InseparableLoss
from brim.losses.form import AuxiliaryTap, LossForm, list_coefficients
from brim.losses.measure import measure_form
from brim.losses.rules import ROWS, CountingRule

SHIFTED = CountingRule(key="labels", shifted=True)
PLAIN = CountingRule(key="labels")
VOCABULARY = 11


class Network(nn.Module):
    """Scores of tokens, and a router loss that is no mean over them."""

    def __init__(self, wide: int = VOCABULARY) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, wide)

    def forward(self, input_ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
        scores = self.head(self.embed(input_ids).cumsum(1).tanh())
        return {"logits": scores, "aux_loss": scores.softmax(-1).mean((0, 1)).square().sum() * 4}


def make_batch(rows: int = 4, width: int = 9, *, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (rows, width), generator=draw)
    labels = tokens.clone()
    for row in range(rows):
        labels[row, : row % 3] = -100
        labels[row, width - row :] = -100
    return {"input_ids": tokens, "labels": labels, "loss_mask": labels.ne(-100).long()}


def pick(logits: Tensor, labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Return the scores and their targets, flat."""
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


def by_hand(logits: Tensor, labels: Tensor, shifted: bool, smooth: float = 0.0) -> Tensor:
    """A mean that none of torch's loss functions makes: fused kernels and label smoothers look like this."""
    scores, target = pick(logits, labels, shifted)
    kept = target.ne(-100)
    logs = scores.log_softmax(-1)[kept]
    chosen = -logs.gather(1, target[kept][:, None]).squeeze(1)
    return ((1 - smooth) * chosen - smooth * logs.mean(-1)).sum() / kept.sum()


MAKERS: dict[str, tuple[Callable[..., Tensor], LossForm]] = {
    "torch, shifted": (
        lambda out, batch: F.cross_entropy(*pick(out["logits"], batch["labels"], True)), LossForm(rule=SHIFTED)
    ),
    "torch, unshifted": (
        lambda out, batch: F.cross_entropy(*pick(out["logits"], batch["labels"], False)), LossForm(rule=PLAIN)
    ),
    "torch, summed and divided": (
        lambda out, batch: F.cross_entropy(*pick(out["logits"], batch["labels"], True), reduction="sum")
        / batch["labels"][:, 1:].ne(-100).sum(), LossForm(rule=SHIFTED),
    ),
    "torch, in chunks of different counts": (
        lambda out, batch: sum(
            F.cross_entropy(out["logits"][:, a:b].flatten(0, 1), batch["labels"][:, a:b].flatten(), reduction="sum")
            for a, b in ((0, 4), (4, 7), (7, 9))
        ) / batch["labels"].ne(-100).sum(), LossForm(rule=PLAIN),
    ),
    "torch, two heads of one count": (
        lambda out, batch: (F.cross_entropy(*pick(out["logits"], batch["labels"], False))
        + F.cross_entropy(*pick(out["logits"].flip(-1), batch["labels"], False))) / 2, LossForm(rule=PLAIN),
    ),
    "torch, one call for each row": (
        lambda out, batch: torch.stack([
            F.cross_entropy(out["logits"][row], batch["labels"][row]) for row in range(len(batch["labels"]))
        ]).mean(), LossForm(rule=ROWS),
    ),
    "torch, a sum": (
        lambda out, batch: F.cross_entropy(*pick(out["logits"], batch["labels"], True), reduction="sum"),
        LossForm(rule=SHIFTED, reduction="sum"),
    ),
    "by hand, shifted": (lambda out, batch: by_hand(out["logits"], batch["labels"], True), LossForm(rule=SHIFTED)),
    "by hand, unshifted": (lambda out, batch: by_hand(out["logits"], batch["labels"], False), LossForm(rule=PLAIN)),
    "smoothed by hand": (
        lambda out, batch: by_hand(out["logits"], batch["labels"], True, 0.2), LossForm(rule=SHIFTED)
    ),
    "rows, by hand": (
        lambda out, batch: -out["logits"].mean(1).log_softmax(-1)[:, 0].mean(), LossForm(rule=ROWS)
    ),
    "rows, summed by hand": (
        lambda out, batch: -out["logits"].mean(1).log_softmax(-1)[:, 0].sum(), LossForm(rule=ROWS, reduction="sum")
    ),
    "regression": (
        lambda out, batch: F.mse_loss(out["logits"][:, -1, :3], batch["input_ids"][:, :3].float()), LossForm(rule=ROWS)
    ),
    "router loss inside": (
        lambda out, batch: F.cross_entropy(*pick(out["logits"], batch["labels"], True)) + 0.25 * out["aux_loss"],
        LossForm(rule=SHIFTED, auxiliary=(("aux_loss", 0.25),)),
    ),
    "router loss beside a mean by hand": (
        lambda out, batch: by_hand(out["logits"], batch["labels"], True) + 0.25 * out["aux_loss"],
        LossForm(rule=SHIFTED, auxiliary=(("aux_loss", 0.25),)),
    ),
}  # fmt: skip


def measure(make: Callable[..., Tensor], network: nn.Module, batch: Any, **settings: Any) -> LossForm:
    return measure_form(lambda inputs: make(network(**inputs), inputs), network, batch, **settings)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("rows", [2, 4, 6])
def test_forms_are_found(name: str, rows: int) -> None:
    make, expected = MAKERS[name]
    assert measure(make, Network(), make_batch(rows), coefficients=[0.25]) == expected


def test_a_mask_may_say_what_counts() -> None:
    def make(out: Any, batch: Any) -> Tensor:
        logs = -out["logits"].log_softmax(-1)[..., 0]
        return (logs * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

    batch = make_batch()
    batch["loss_mask"][0, :4] = 0  # unlike the labels
    del batch["labels"]
    assert measure(make, Network(), batch) == LossForm(rule=CountingRule(key="loss_mask", ignored=0))


@pytest.mark.parametrize("name", ["torch, shifted", "torch, unshifted", "by hand, shifted", "by hand, unshifted",
                                  "rows, by hand", "router loss inside"])  # fmt: skip
def test_sixteen_bit_models_are_measured_too(name: str) -> None:
    make, expected = MAKERS[name]
    network = Network().bfloat16()

    def loss_of(inputs: Any) -> Tensor:
        out = network(**inputs)  # as transformers does it: the loss is made in 32 bit
        return make({**out, "logits": out["logits"].float()}, inputs)

    found = measure_form(loss_of, network, make_batch(), coefficients=[0.25])
    assert found == expected


def test_a_small_router_loss_is_not_lost_in_the_noise_of_sixteen_bit() -> None:
    """The loss itself is made in 32 bit, from calls that were seen: what is left over is no noise."""
    network = Network().bfloat16()

    def loss_of(inputs: Any) -> Tensor:
        out = network(**inputs)
        return F.cross_entropy(*pick(out["logits"].float(), inputs["labels"], True)) + 0.02 * out["aux_loss"].float()

    found = measure_form(loss_of, network, make_batch(), coefficients=[0.02])
    assert found == LossForm(rule=SHIFTED, auxiliary=(("aux_loss", 0.02),))


def test_autocast_inside_the_loss_widens_the_tolerance() -> None:
    """Kernels of other sizes round differently: noise of 16 bit is no reason to refuse."""
    network, calls = Network(), []

    def loss_of(inputs: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = network(**inputs)["logits"].float()
        calls.append(1)
        return F.cross_entropy(*pick(scores * (1 + 5e-3 * (len(calls) % 3)), inputs["labels"], True))

    assert measure_form(loss_of, network, make_batch()) == LossForm(rule=SHIFTED)


@pytest.mark.parametrize(("make", "reason"), [
    (lambda out, batch: F.cross_entropy(*pick(out["logits"], batch["labels"], False))
        + F.cross_entropy(out["logits"][:, 0], batch["input_ids"][:, 1]), "different counts"),
    (lambda out, batch: F.cross_entropy(
        out["logits"][:, -1] @ out["logits"][:, 0].T, torch.arange(len(batch["labels"]))), "off the mean"),
    (lambda out, batch: out["logits"].var(), "no count"),
    (lambda out, batch: F.cross_entropy(*pick(out["logits"], batch["labels"], True))
        + out["logits"].mean((1, 2)).std(unbiased=False), "."),
])  # fmt: skip
def test_losses_that_do_not_split_are_refused(make: Callable[..., Tensor], reason: str) -> None:
    network, batch = Network(), make_batch()
    del batch["loss_mask"]
    with pytest.raises(InseparableLoss, match=reason) as caught:
        measure(make, network, batch)
    assert caught.value.exit_code == 4 and caught.value.reason in str(caught.value)


def test_masked_words_and_next_sentences_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertForPreTraining(config)
    batch = make_batch()
    inputs = {key: batch[key] for key in ("input_ids", "labels")}
    inputs["next_sentence_label"] = torch.tensor([0, 1, 1, 0])
    with pytest.raises(InseparableLoss, match="different counts"):
        measure_form(lambda part: model(**part).loss, model, inputs)


def test_in_batch_negatives_are_told_what_to_use() -> None:
    def make(out: Any, batch: Any) -> Tensor:
        scores = out["logits"][:, -1] @ out["logits"][:, 0].T
        return (scores.logsumexp(1) - scores.diagonal()).mean()

    with pytest.raises(InseparableLoss, match="accumulate_contrastive"):
        measure(make, Network(), {"input_ids": make_batch()["input_ids"]})


def test_batch_norm_is_refused_while_it_trains() -> None:
    network = Network()
    network.norm = nn.BatchNorm1d(3)
    make, expected = MAKERS["torch, shifted"]
    with pytest.raises(InseparableLoss, match="batch-norm layer norm"):
        measure(make, network, make_batch())
    network.norm.eval()
    assert measure(make, network, make_batch()) == expected


def test_measuring_changes_nothing() -> None:
    network, batch = Network(), make_batch()
    network.register_buffer("seen", torch.zeros(()))
    network.drop = nn.Dropout(0.5)
    network.head.eval()
    kept = {key: value.clone() for key, value in batch.items()}

    def loss_of(inputs: Any) -> Tensor:
        network.seen += 1
        torch.rand(3)
        inputs["labels"][:] = inputs["labels"].clamp(max=5)
        return F.cross_entropy(*pick(network(**inputs)["logits"], inputs["labels"], True))

    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    measure_form(loss_of, network, batch)
    assert torch.rand(()) == expected and network.seen == 0
    assert network.training and network.drop.training and not network.head.training
    assert all(torch.equal(batch[key], kept[key]) for key in batch)
    assert not network._forward_hooks and all(p.grad is None for p in network.parameters())


def test_the_loss_may_ignore_another_target() -> None:
    """-100 is out of range there: an error on the CPU, the end of the process on a GPU."""
    batch = make_batch()
    batch["labels"] = batch["labels"].clamp(min=0)

    def make(out: Any, part: Any) -> Tensor:
        return F.cross_entropy(*pick(out["logits"], part["labels"], True), ignore_index=0)

    assert measure(make, Network(), batch) == LossForm(rule=CountingRule(key="labels", shifted=True, ignored=0))


def test_spans_count_at_any_padded_length() -> None:
    """Their losses ignore the padded length, which is another number in the next batch."""

    def make(out: Any, part: Any) -> Tensor:
        width = out["logits"].shape[1]
        ends = [part[key].clamp(0, width) for key in ("start_positions", "end_positions")]
        scores = out["logits"].unbind(-1)
        return sum(F.cross_entropy(*pair, ignore_index=width) for pair in zip(scores[:2], ends, strict=True)) / 2

    spans = {"start_positions": torch.tensor([1, 2, 0, 4]), "end_positions": torch.tensor([3, 2, 5, 4])}
    rule = measure(make, Network(), {"input_ids": make_batch()["input_ids"], **spans}).rule
    assert int(rule.count({"start_positions": torch.tensor([9, 2, 1]), "end_positions": torch.tensor([9, 2, 1])})) == 3


def test_coefficients_are_rounded_to_what_the_config_declares() -> None:
    make, _ = MAKERS["router loss inside"]
    (found,) = measure(make, Network(), make_batch()).auxiliary
    assert found[0] == "aux_loss" and found[1] == pytest.approx(0.25, rel=1e-3)
    assert measure(make, Network(), make_batch(), coefficients=[0.001, 0.2501]).auxiliary == (("aux_loss", 0.2501),)


def test_declared_coefficients_are_listed() -> None:
    text = SimpleNamespace(router_aux_loss_coef=0.02)
    assert list_coefficients(SimpleNamespace(aux_loss_coef=0, text_config=text), None) == [0.02]


def test_one_row_is_enough_where_torch_makes_the_loss() -> None:
    make, expected = MAKERS["torch, shifted"]
    assert measure(make, Network(), make_batch(1)) == expected
    with pytest.raises(InseparableLoss, match="one row"):
        measure(lambda out, batch: out["logits"].mean(), Network(), {"input_ids": make_batch(1)["input_ids"]})


def test_forms_are_words() -> None:
    form = LossForm(rule=SHIFTED, auxiliary=(("aux_loss", 0.001),))
    assert str(form) == "mean over labels[..., 1:] != -100 + 0.001 x aux_loss"


def test_the_auxiliary_tap_keeps_no_graph() -> None:
    network = Network()
    tap = AuxiliaryTap(network)
    network(**make_batch())
    parts = tap.take()
    assert parts["aux_loss"].requires_grad and tap.take() == {}
    tap.remove()
    network(**make_batch())
    assert tap.take() == {}

"""Accumulation bugs planted in a loop: each is caught and named."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig

from brim.checks import diagnose
from brim.checks.accumulation import WINDOW, Split, Subject, verify_accumulation
from brim.checks.gradients import differentiate
from brim.checks.loops import own_loss
from brim.checks.sequences import collate, make_rows
from brim.checks.subjects import build_model
from brim.losses.rules import CountingRule

SHIFTED, UNSHIFTED = CountingRule(key="labels", shifted=True), CountingRule(key="labels")
COEFFICIENT = 0.1


@dataclass
class Pieces:
    """What a loop has in hand at the end of a window."""

    means: list[Tensor]
    """Gradient of each micro-batch's own mean."""
    counts: list[int]
    unshifted: list[int]
    parts: list[Tensor]
    """Gradient of each micro-batch's auxiliary loss."""
    steps: int
    """Micro-batches that were asked for."""

    @property
    def exact(self) -> list[Tensor]:
        return [mean * count / sum(self.counts) for mean, count in zip(self.means, self.counts, strict=True)]

    @property
    def auxiliary(self) -> Tensor:
        return torch.stack(self.parts).mean(0) if self.parts else torch.zeros(())


def clip(gradient: Tensor, most: float = 0.05) -> Tensor:
    return gradient * min(1.0, most / max(float(gradient.norm()), 1e-12))


def sum_of(gradients: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(gradients)).sum(0)


Loop = Callable[[Pieces], "Tensor | None"]
LOOPS: dict[str, tuple[Loop, str, dict[str, Any]]] = {
    "no division": (lambda p: sum_of(p.exact) * len(p.means), diagnose.NOT_DIVIDED, {}),
    "double division": (lambda p: sum_of(p.exact) / len(p.means), diagnose.DIVIDED_TWICE, {}),
    "forgotten rank factor": (lambda p: sum_of(p.exact) / 2, diagnose.RANK_FACTOR, {"num_ranks": 2}),
    "unshifted count": (
        lambda p: sum_of(p.exact) * sum(p.counts) / sum(p.unshifted), diagnose.WRONG_COUNT, {}
    ),
    "mean of means": (lambda p: sum_of(p.means) / len(p.means), diagnose.MEAN_OF_MEANS, {}),
    "mean of means, not divided": (lambda p: sum_of(p.means), diagnose.NOT_DIVIDED, {}),
    "partial window by the configured steps": (
        lambda p: sum_of(p.exact) * len(p.means) / p.steps, diagnose.PARTIAL_WINDOW, {}
    ),
    "dropped tail": (lambda p: sum_of(p.exact) if len(p.means) == p.steps else None, diagnose.TAIL_DROPPED, {}),
    "dropped micro-batch": (lambda p: sum_of(p.exact[:-1] or p.exact), diagnose.DROPPED, {}),
    "aux k times": (
        lambda p: sum_of(p.exact) + p.auxiliary * len(p.parts), diagnose.AUXILIARY, {"moe": True}
    ),
    "clip before accumulate": (lambda p: sum_of([clip(one) for one in p.exact]), diagnose.CLIPPED, {}),
    "noise": (lambda p: sum_of(p.exact) + torch.linspace(-1, 1, len(p.means[0])), diagnose.NOT_SEPARABLE, {}),
}  # fmt: skip


def subject_of(loop: Loop, *, num_ranks: int = 1, moe: bool = False) -> Subject:
    """Return a subject that combines the gradients of its micro-batches as a loop does."""
    config = MixtralConfig(output_router_logits=True, router_aux_loss_coef=COEFFICIENT) if moe else LlamaConfig()
    architecture = "MixtralForCausalLM" if moe else "LlamaForCausalLM"
    model = build_model(config.to_dict(), architecture)
    rows = make_rows(architecture, model.config, WINDOW + (3 if num_ranks == 1 else 4))

    def run(split: Split) -> list[Tensor]:
        module, found = copy.deepcopy(model).train(), []
        for start in range(0, len(rows), WINDOW):
            window, size = rows[start : start + WINDOW], split.micro_batch_size
            batches = [collate(window[at : at + size]) for at in range(0, len(window), size)]
            step = loop(take_apart(module, batches, split.accumulation_steps, moe=moe))
            found += [step] if step is not None else []
        return found

    return Subject(
        name="a loop", model=model, rows=rows, collate=collate, loss_of=own_loss, run=run, fix="mend it",
        num_ranks=num_ranks,
    )  # fmt: skip


def take_apart(module: Any, batches: list[Any], steps: int, *, moe: bool) -> Pieces:
    counts = [int(SHIFTED.count(batch)) for batch in batches]
    filled = [batch if n else SHIFTED.add_term(batch) for batch, n in zip(batches, counts, strict=True)]
    parts = [
        differentiate(module, lambda m, b: COEFFICIENT * m(**b).aux_loss, batch) for batch in (filled if moe else [])
    ]
    whole = [differentiate(module, own_loss, batch) for batch in filled]
    means = [one - part for one, part in zip(whole, parts, strict=True)] if moe else whole
    return Pieces(means, counts, [int(UNSHIFTED.count(batch)) for batch in batches], parts, steps)


@pytest.mark.parametrize("moe", [False, True])
def test_the_loop_without_a_bug_is_exact(moe: bool) -> None:
    report = verify_accumulation(subject_of(lambda p: sum_of(p.exact) + p.auxiliary, moe=moe))
    assert report.exact
    assert report.fix == ""
    assert report.worst.error < 1e-6
    assert (report.batch_error > 1e-3) == moe


@pytest.mark.parametrize("bug", LOOPS)
def test_a_planted_bug_is_caught_and_named(bug: str) -> None:
    loop, name, options = LOOPS[bug]
    report = verify_accumulation(subject_of(loop, **options))
    assert not report.exact
    assert any(name in cause for cause in report.causes), report.causes
    assert report.fix == "mend it"

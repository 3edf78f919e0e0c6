"""`verify`: do the knobs of a strategy leave the training result as it is, or do they belong to the workload?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cache, partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from brim.checks.accumulation import WINDOW, one_thread
from brim.checks.gradients import compare_gradients, flatten, relative_error
from brim.checks.knobs import SHARDING, Collate, Inputs, Knob, StepWith, list_knobs, pick_forms, set_attention
from brim.checks.loops import own_loss
from brim.checks.report import FP32_LIMIT, KnobResult, NeutralityReport, Verdict
from brim.checks.shards import NUM_RANKS, Run, Shared, differentiate_on_ranks
from brim.checks.trainers import list_versions
from brim.errors import InvalidInput, ProbeFailed
from brim.spec.recipe import Recipe
from brim.spec.strategy import Mesh, Strategy

STATE_LIMIT = 1e-5
"""Relative error of what an optimizer has moved the weights by, above which a kernel is not neutral; kernels that are
given the same gradients agree to 1e-6 (AdamW, SGD; torch 2.13 on a CPU)."""
_BELONGS: Verdict = "belongs to the workload"
_DROPOUT = 0.1
_STEPS = 4
TOGETHER = "together"
"""Name of the row in which all knobs that are neutral alone are turned."""


def verify_neutrality(
    model: nn.Module, rows: Sequence[Any], collate: Collate, strategy: Strategy | Sequence[Knob], *,
    recipe: Recipe | None = None,
) -> NeutralityReport:  # fmt: skip
    """Return the proof: the gradient with each knob turned alone, and with all of them, beside the plain one.

    Plain is eager attention, a dense loss, padded rows, one rank, nothing recomputed, offloaded or compiled. fp32 fails
    above a relative error of 1e-5 (noise floor 5e-7). An optimizer kernel is given the gradients of four micro-batches
    and compared with the loop by what it moves the weights by (limit 1e-5). What recomputes or moves activations is
    compared with dropout on as well: it must not draw anew. Two ranks are compared with the mean over their halves of
    the batch; how ranks are weighted is the proof of accumulation's.

    Args:
        model: small, on the CPU, dropout off.
        rows: 8 sequences or more, as the collator takes them.
        collate: makes a padded micro-batch of them.
        strategy: whose knobs are turned, or knobs themselves.
        recipe: the workload's optimizer and engine; AdamW and both forms of checkpointing if None.

    Raises:
        InvalidInput: fewer than 8 sequences. ProbeFailed: the model does not run plainly, or never twice the same.
    """
    if len(rows) < WINDOW:
        raise InvalidInput(f"neutrality is verified on {WINDOW} sequences, not {len(rows)}")
    bench = _Bench(model, rows[:WINDOW], collate)
    stated = strategy if isinstance(strategy, Strategy) else None
    knobs = tuple(strategy) if stated is None else list_knobs(stated, model, bench.rows, recipe)
    with one_thread(), torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        bench.rehearse()
        local = [knob for knob in knobs if knob.name != SHARDING]
        found = [bench.judge(knob) for knob in local]
        neutral = [knob for knob, result in zip(local, found, strict=True) if result.verdict == "neutral"]
        for knob in knobs:
            if knob.name == SHARDING and stated is None:
                found.append(_leave_unchecked(knob, "ranks rebuild their knobs: give a strategy"))
            elif knob.name == SHARDING and stated is not None:
                found += _judge_ranks(bench, stated, recipe, neutral, knob)
        if len(local) == len(knobs):
            found += bench.judge_together(neutral)
    name = type(model).__name__
    return NeutralityReport(subject=name, precision="fp32", knobs=tuple(found), versions=dict(list_versions()))


class _Bench:
    """The plain run and the same run with knobs turned."""

    def __init__(self, model: nn.Module, rows: Sequence[Any], collate: Collate) -> None:
        self.model, self.rows, self.collate = copy.deepcopy(model), list(rows), collate
        self.kernel = ""
        self.plain = cache(self._plain)
        with suppress(ProbeFailed):  # no attention, or only the model's own
            set_attention("eager", self.model)

    def rehearse(self) -> None:
        """Run plainly twice.

        Raises:
            ProbeFailed: the model does not run on these sequences, or no run repeats another.
        """
        name = type(self.model).__name__
        try:
            error = relative_error(self.differentiate(), self.plain())
        except Exception as failure:
            raise ProbeFailed(f"{name} has no gradient on made-up sequences: {_describe_error(failure)}") from failure
        if not error <= FP32_LIMIT:
            raise ProbeFailed(f"two plain runs of {name} differ by {error:.1e}, so nothing can be compared with them")

    def judge(self, knob: Knob) -> KnobResult:
        """Return what turning one knob does."""
        if knob.obstacle:
            return _leave_unchecked(knob, knob.obstacle)
        try:
            if knob.step_with is not None:
                return _compare(knob, self.step(knob.step_with), self.step(knob.step_as), STATE_LIMIT)
            return self._judge_gradient(knob)
        except Exception as error:  # whatever a model class or a kernel raises on this machine
            return _leave_unchecked(knob, _describe_error(error))

    def judge_together(self, knobs: Sequence[Knob]) -> list[KnobResult]:
        """Return what turning several knobs at once does to the gradient, each of them neutral alone."""
        turned = pick_forms(knobs)
        if len(turned) < 2:
            return []
        together = _join(turned)
        try:
            return [_compare(together, self.differentiate(turned), self.plain())]
        except Exception as error:
            return [_leave_unchecked(together, _describe_error(error))]

    def _judge_gradient(self, knob: Knob) -> KnobResult:
        """Return what a knob does to the gradient, with dropout off and, if it could draw anew, on."""
        base = [] if knob.name == "attention_kernel" else self._attention()
        result = _compare(knob, self.differentiate([*base, knob]), self.plain(attention=bool(base)))
        if knob.name == "attention_kernel" and result.verdict == "neutral":
            self.kernel = knob.value  # what follows is turned under the attention that the strategy has
        if not knob.draws_again or result.verdict != "neutral":
            return result
        wet = self.plain(attention=bool(base), dropout=True)
        drawn = _compare(knob, self.differentiate([*base, knob], dropout=True), wet)
        if drawn.verdict == "neutral":
            return max(result, drawn, key=lambda one: one.error or 0.0)
        return replace(drawn, reason="with dropout on: what is computed again draws other random numbers")

    def _attention(self) -> list[Knob]:
        if not self.kernel:
            return []
        kernel = partial(set_attention, self.kernel)
        return [Knob(name="attention_kernel", value=self.kernel, prepare=kernel)]

    def _plain(self, *, attention: bool = False, dropout: bool = False) -> Tensor:
        return self.differentiate(self._attention() if attention else [], dropout=dropout)

    def differentiate(
        self, knobs: Sequence[Knob] = (), *, dropout: bool = False, rows: Sequence[Any] | None = None
    ) -> Tensor:
        """Return the gradient of a micro-batch with knobs turned."""
        model = copy.deepcopy(self.model).train()
        if dropout:
            switch_dropout_on(model)
        called, loss_of, collate = model, own_loss, self.collate
        for knob in knobs:
            called, loss_of = knob.prepare(called), knob.loss_of or loss_of
            collate = knob.collate or collate
        inputs: Inputs = collate(list(self.rows if rows is None else rows))
        torch.manual_seed(0)
        with ExitStack() as stack:
            for knob in knobs:
                stack.enter_context(knob.around())
            loss_of(called, inputs).backward()
        return flatten(parameter for parameter in model.parameters() if parameter.requires_grad)

    def step(self, step_with: StepWith) -> Tensor:
        """Return what an optimizer moves the weights by when it is given the gradients of four micro-batches.

        They are taken at the first weights: a rounding error of one step must not become another gradient in the next.
        """
        model = copy.deepcopy(self.model).train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer = step_with(parameters)
        for gradients in self._list_gradients():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            optimizer.step()
        for parameter, first in zip(parameters, before, strict=True):
            parameter.grad = parameter.detach() - first
        return flatten(parameters)

    def _list_gradients(self) -> list[list[Tensor | None]]:
        size = WINDOW // _STEPS
        found = []
        for start in range(0, WINDOW, size):
            model = copy.deepcopy(self.model).train()
            own_loss(model, self.collate(self.rows[start : start + size])).backward()
            found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        return found


def switch_dropout_on(model: nn.Module) -> None:
    """Let a model drop a tenth wherever it can drop anything."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = _DROPOUT
        for name, value in vars(module).items():
            if isinstance(value, float) and "dropout" in name:
                setattr(module, name, _DROPOUT)


def _join(knobs: Sequence[Knob]) -> Knob:
    """Return several knobs as one, for the report only."""
    value = ", ".join(knob.name for knob in knobs)
    return Knob(name=TOGETHER, value=value, meaning="each is neutral alone, together they are not")


def _judge_ranks(
    bench: _Bench, strategy: Strategy, recipe: Recipe | None, neutral: Sequence[Knob], knob: Knob
) -> list[KnobResult]:
    """Return what two ranks do to the gradient, alone and with all that is neutral."""
    half = WINDOW // NUM_RANKS
    halves = [bench.rows[start : start + half] for start in range(0, WINDOW, half)]
    turned = pick_forms(neutral)
    alone = Strategy(
        micro_batch_size=half, gradient_accumulation_steps=1, attention_kernel="eager", optimizer_kernel="loop",
        zero_stage=strategy.zero_stage, mesh=Mesh(dp_replicate=NUM_RANKS),
    )  # fmt: skip
    together = replace(alone, **{one.name: getattr(strategy, one.name) for one in turned})
    asked = [knob, _join([*turned, knob])][: 2 if turned else 1]
    join = next((one.collate for one in turned if one.collate is not None), bench.collate)
    runs = (
        Run(strategy=alone, batches=tuple(dict(bench.collate(rows)) for rows in halves)),
        Run(strategy=together, batches=tuple(dict(join(rows)) for rows in halves)),
    )[: len(asked)]
    try:
        found = differentiate_on_ranks(Shared(model=bench.model, rows=bench.rows, runs=runs, recipe=recipe))
    except ProbeFailed as error:
        return [_leave_unchecked(one, str(error)) for one in asked]
    wanted = torch.stack([bench.differentiate(rows=rows) for rows in halves]).mean(0)
    return [
        _compare(one, got, wanted) if isinstance(got, Tensor) else _leave_unchecked(one, got)
        for one, got in zip(asked, found, strict=True)
    ]


def _compare(knob: Knob, found: Tensor, wanted: Tensor, limit: float = FP32_LIMIT) -> KnobResult:
    """Return the verdict on what a knob gives beside what the plain run gives."""
    error, norm_ratio, cosine = compare_gradients(found, wanted)
    if not isfinite(error):
        return KnobResult(knob=knob.name, value=knob.value, verdict=_BELONGS, reason="its gradient is not finite")
    return KnobResult(
        knob=knob.name, value=knob.value, verdict="neutral" if error <= limit else _BELONGS, error=error,
        norm_ratio=norm_ratio, cosine=cosine,
        reason=knob.note if error <= limit else knob.meaning or knob.note,
    )  # fmt: skip


def _leave_unchecked(knob: Knob, reason: str) -> KnobResult:
    return KnobResult(knob=knob.name, value=knob.value, verdict="not checked", reason=reason)


def _describe_error(error: Exception) -> str:
    if isinstance(error, ProbeFailed):
        return str(error)
    return f"does not run here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"

"""`verify`: does accumulating micro-batches give the big batch's gradient, and if not, why?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from brim.checks import diagnose
from brim.checks.gradients import compare_gradients, differentiate, relative_error
from brim.checks.report import BF16_NOISE, SMALL, AccumulationReport, SplitResult, is_exact, without_numbers
from brim.errors import InvalidInput
from brim.losses.form import AuxiliaryTap, LossForm
from brim.losses.measure import measure_form
from brim.losses.rules import list_rules

Inputs = Mapping[str, Any]
WINDOW = 8
"""Sequences of a full window: enough for four ways to split it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One way to cut a window."""

    micro_batch_size: int
    """Sequences per rank per forward."""
    accumulation_steps: int
    """Micro-batches per rank per optimizer step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is verified: a model, sequences, and the loop that trains on them."""

    name: str
    """Model class and loop, for people."""
    model: nn.Module
    """The model with the weights that every run starts from, dropout off."""
    rows: Sequence[Any]
    """Sequences, as the collator takes them; the last window may be partial."""
    collate: Callable[[list[Any]], Inputs]
    """Makes a micro-batch of sequences."""
    loss_of: Callable[[nn.Module, Inputs], Tensor]
    """The loss of a micro-batch as the loop defines it, before anything is scaled."""
    run: Callable[[Split], list[Tensor]]
    """Trains one epoch with a split and returns the gradient of each optimizer step, as one vector each."""
    fix: str
    """The line that makes this loop exact."""
    num_ranks: int = 1
    """Data-parallel ranks that `run` runs on."""
    precision: str = "fp32"
    """`fp32` or `bf16`."""
    size: str = SMALL
    """What stands for the user's model."""
    coefficients: tuple[float, ...] = ()
    """Coefficients of auxiliary losses that the config declares."""
    versions: tuple[tuple[str, str], ...] = ()
    """Packages that run."""


def verify_accumulation(subject: Subject, splits: Sequence[Split] = ()) -> AccumulationReport:
    """Return the proof: the gradient of every optimizer step of every split beside the truth.

    The truth is the sum of single, unpadded sequences, each weighted by what its loss averages over. Auxiliary losses
    are not linear in the batch; for them it is the mean over the micro-batches, and `batch_error` says how far that is
    from the one-batch gradient.

    Args:
        subject: what is verified.
        splits: ways to cut a window; every power of two that the ranks allow if empty.

    Raises:
        InseparableLoss: no weighted mean of micro-batches is the loss of the batch.
    """
    with one_thread():
        truth = _Truth(subject)
        results: list[SplitResult] = []
        for split in splits or list_splits(subject.num_ranks):
            results += _compare(subject, truth, split)
        padding, batch = truth.padding_error(), truth.batch_error()
    causes = tuple(dict.fromkeys(without_numbers(result.cause) for result in results if result.cause))
    return AccumulationReport(
        subject=subject.name, loss=str(truth.form), precision=subject.precision, size=subject.size,
        splits=tuple(results), padding_error=padding, batch_error=batch, causes=causes,
        fix=_name_fix(subject, causes), versions=dict(subject.versions),
    )  # fmt: skip


def _name_fix(subject: Subject, causes: Sequence[str]) -> str:
    """Return the line that mends some causes; nothing where nothing is wrong."""
    if causes and set(causes) <= {diagnose.PADDING}:
        return "batches of equally long sequences; it is the model that sees padding, whoever accumulates"
    return subject.fix if causes else ""


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: a small model's kernels take less time than handing them out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def list_splits(num_ranks: int) -> list[Split]:
    """Return the ways to cut a window of 8 sequences over ranks, few micro-batches first."""
    per_rank = WINDOW // num_ranks
    if per_rank < 1 or WINDOW % num_ranks:
        raise InvalidInput(f"a window of {WINDOW} sequences does not split over {num_ranks} ranks; use 1, 2, 4 or 8")
    sizes = [size for size in (8, 4, 2, 1) if size <= per_rank]
    return [Split(micro_batch_size=size, accumulation_steps=per_rank // size) for size in sizes]


class _Truth:
    """The gradients that exact accumulation gives, window by window."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._model = subject.model.train()
        whole = subject.collate(list(subject.rows[:WINDOW]))
        self.form: LossForm = measure_form(
            lambda inputs: subject.loss_of(self._model, inputs), self._model, whole, coefficients=subject.coefficients
        )
        self.gradient_of = cache(self._gradient_of)

    def windows(self) -> list[range]:
        """Return the sequences of each optimizer step."""
        size = len(self._subject.rows)
        return [range(start, min(start + WINDOW, size)) for start in range(0, size, WINDOW)]

    def mean_gradient(self, window: range, split: Split) -> Tensor:
        """Return the gradient of a window: sequences alone for the mean, micro-batches for auxiliary parts."""
        alone = [self.gradient_of(row, row + 1) for row in window]
        shares = self.shares([count for _, _, count in alone])
        mean = sum((g * share for (g, _, _), share in zip(alone, shares, strict=True)), torch.zeros_like(alone[0][0]))
        if not self.form.auxiliary:
            return mean
        parts = [self.gradient_of(*bounds)[1] for bounds in cut(window, split.micro_batch_size)]
        return mean + torch.stack(parts).mean(0)

    def shares(self, counts: Sequence[int]) -> list[float]:
        """Return the weight that each of some micro-batches must get."""
        total = max(sum(counts), 1)
        return [1.0 if self.form.reduction == "sum" else count / total for count in counts]

    def padding_error(self) -> float:
        """Return how far the collated batch is from its sequences run alone."""
        window = self.windows()[0]
        if self.form.auxiliary:
            return 0.0
        return relative_error(self.gradient_of(window.start, window.stop)[0], self.mean_gradient(window, Split(
            micro_batch_size=WINDOW, accumulation_steps=1)))  # fmt: skip

    def batch_error(self) -> float:
        """Return how far the mean over single sequences' auxiliary parts is from the one batch's."""
        if not self.form.auxiliary:
            return 0.0
        window = self.windows()[0]
        pieces, whole = Split(micro_batch_size=1, accumulation_steps=8), Split(micro_batch_size=8, accumulation_steps=1)
        return relative_error(self.mean_gradient(window, pieces), self.mean_gradient(window, whole))

    def _gradient_of(self, start: int, stop: int) -> tuple[Tensor, Tensor, int]:
        """Return the gradients of the mean and of the auxiliary part of some sequences, and what the mean counts."""
        inputs = self._subject.collate(list(self._subject.rows[start:stop]))
        count = int(self.form.rule.count(inputs))
        inputs = inputs if count else self.form.rule.add_term(inputs)
        both = differentiate(self._model, self._subject.loss_of, inputs)
        part = self._differentiate_auxiliary(inputs) if self.form.auxiliary else torch.zeros_like(both)
        return both - part, part, count

    def _differentiate_auxiliary(self, inputs: Inputs) -> Tensor:
        """Return the gradient of the auxiliary part alone."""
        tap = AuxiliaryTap(self._model)

        def auxiliary_of(model: nn.Module, batch: Inputs) -> Tensor:
            self._subject.loss_of(model, batch)
            return torch.as_tensor(self.form.sum_auxiliary(tap.take()))

        try:
            return differentiate(self._model, auxiliary_of, inputs)
        finally:
            tap.remove()


def cut(window: range, size: int) -> list[tuple[int, int]]:
    """Return where each micro-batch of a window starts and stops."""
    return [(start, min(start + size, window.stop)) for start in range(window.start, window.stop, size)]


def _compare(subject: Subject, truth: _Truth, split: Split) -> list[SplitResult]:
    """Return the results of one split, one for each window."""
    steps = subject.run(split)
    windows = truth.windows()
    wanted = [truth.mean_gradient(window, split) for window in windows]
    found = []
    for index, window in enumerate(windows):
        pieces = cut(window, split.micro_batch_size)
        if len(window) % (split.micro_batch_size * subject.num_ranks) and subject.num_ranks > 1:
            continue  # loaders repeat sequences to give every rank its share: another batch, whatever its weights
        if index >= len(steps):
            missing = _measure(subject, split, index, len(pieces), torch.zeros_like(wanted[index]), wanted[index])
            found.append(replace(missing, cause=diagnose.TAIL_DROPPED))
            continue
        result = _measure(subject, split, index, len(pieces), steps[index], wanted[index])
        if not is_exact(result.error, result.norm_ratio, result.cosine, subject.precision):
            cause = _find_cause(subject, truth, split, window, steps[index])
            if index and cause == diagnose.NOT_SEPARABLE and _leaks(truth, split, (windows[0], window), steps[index]):
                cause = diagnose.TAIL_LEAKS
            result = replace(result, cause=cause)
        found.append(result)
    return found


def _leaks(truth: _Truth, split: Split, windows: Sequence[range], found: Tensor) -> bool:
    """Return whether a step is made of a window's micro-batches and of the next epoch's first ones."""
    pieces = [truth.gradient_of(*bounds) for window in windows for bounds in cut(window, split.micro_batch_size)]
    return diagnose.is_made_of(found, [vector for mean, part, _ in pieces for vector in (mean, part)])


def _measure(
    subject: Subject, split: Split, window: int, num_micro_batches: int, found: Tensor, wanted: Tensor
) -> SplitResult:
    error, norm_ratio, cosine = compare_gradients(found, wanted)
    return SplitResult(
        micro_batch_size=split.micro_batch_size, gradient_accumulation_steps=split.accumulation_steps,
        num_ranks=subject.num_ranks, window=window, num_micro_batches=num_micro_batches,
        error=error, norm_ratio=norm_ratio, cosine=cosine,
    )  # fmt: skip


def _find_cause(subject: Subject, truth: _Truth, split: Split, window: range, found: Tensor) -> str:
    """Return the name of what is wrong with one optimizer step."""
    pieces = cut(window, split.micro_batch_size)
    whole = subject.collate([subject.rows[row] for row in window])
    gradients = [truth.gradient_of(*piece) for piece in pieces]
    evidence = diagnose.Evidence(
        found=found, means=[mean for mean, _, _ in gradients], shares=truth.shares([n for _, _, n in gradients]),
        num_terms=sum(count for _, _, count in gradients), rows=[stop - start for start, stop in pieces],
        auxiliary=[part for _, part, _ in gradients] if truth.form.auxiliary else (),
        accumulation_steps=split.accumulation_steps, num_ranks=subject.num_ranks,
        noise=diagnose.CLOSE if subject.precision == "fp32" else BF16_NOISE,
        other_counts={str(rule): int(rule.count(whole)) for rule in list_rules(whole)},
    )  # fmt: skip
    weighted = sum(mean * share for mean, share in zip(evidence.means, evidence.shares, strict=True))
    parts = torch.stack(list(evidence.auxiliary)).mean(0) if evidence.auxiliary else 0.0
    if is_exact(*compare_gradients(found, weighted + parts), subject.precision):
        return diagnose.PADDING
    return diagnose.name_cause(evidence)

"""Measure what a loss averages over, on the model that is trained, never by the name of its class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from brim.errors import InseparableLoss
from brim.losses.form import AuxiliaryTap, LossForm
from brim.losses.rules import IGNORED, ROWS, CountingRule, list_rules
from brim.losses.tap import LossCall, LossTap
from brim.losses.views import Inputs, Parts, repeat_rows, split_labels, split_rows, vary_labels

PRECISE, COARSE = 2e-5, 3e-2
"""Relative difference of two losses that are the same number in fp32, and in 16 bit (measured noise floors: 5e-7 and
6e-3)."""

_SHORT = (torch.bfloat16, torch.float16)

LossOf = Callable[[Inputs], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One loss and what was seen of its making."""

    loss: float
    calls: Sequence[LossCall] = ()
    auxiliary: dict[str, float] = field(default_factory=dict)
    precise: float = PRECISE
    """Relative difference that counts as none between the loss and what the calls gave: no noise of kernels in it."""


def measure_form(
    loss_of: LossOf, model: nn.Module, batch: Inputs, *, parts: Iterable[Parts] = (),
    coefficients: Sequence[float] = (),
) -> LossForm:  # fmt: skip
    """Return what a loss averages over.

    Torch's own loss functions are watched first. A loss made elsewhere (fused, smoothed, of a preference trainer) is
    measured from outside: the same batch with some of its labels, then in two parts; the rule is the one under which
    the parts give the whole. Last, the whole is compared with its parts: a loss that no count explains is refused.

    Args:
        loss_of: returns the loss of a batch as the training step computes it.
        model: the module whose outputs may show auxiliary losses.
        batch: a micro-batch as keyword arguments; it is copied, never changed.
        parts: batches and what they are made of, where cutting rows does not do (pairs, packed rows, images).
        coefficients: values that the config declares for auxiliary losses, to round a measured one to.

    Raises:
        InseparableLoss: no counting rule makes the loss of a batch the weighted mean of its micro-batches'.
    """
    refuse_batch_norm(model)
    with _Watch(loss_of, model) as watch:
        precise = watch.find_tolerance(batch)
        form = _from_calls(watch, batch) or _from_labels(watch, batch, precise)
        trials = [*split_rows(batch), *parts]
        if form is None:
            return _from_parts(watch, trials, precise)
        return _confirm(watch, form, trials, precise, coefficients)


def refuse_batch_norm(model: nn.Module) -> None:
    """Raise InseparableLoss if a trained layer normalises over the micro-batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise InseparableLoss(
                reason=f"batch-norm layer {name} normalises over the micro-batch",
                advice="freeze its statistics (.eval()) or use group norm, or keep the micro-batch at the whole batch",
            )


class _Watch:
    """Runs the loss without gradients in evaluation mode; module modes, random state and buffers are put back."""

    def __init__(self, loss_of: LossOf, model: nn.Module) -> None:
        self._loss_of, self._model = loss_of, model
        self._is_coarse = False
        self.ignored = IGNORED

    def __enter__(self) -> _Watch:
        self._modes = {module: module.training for module in self._model.modules()}
        self._buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        self._random = torch.random.fork_rng(devices=devices)
        self._random.__enter__()
        self._tap = AuxiliaryTap(self._model)
        self._model.eval()
        return self

    def __exit__(self, *error: Any) -> None:
        self._tap.remove()
        for module, training in self._modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, kept in self._buffers:
                buffer.copy_(kept)
        self._random.__exit__(*error)

    def find_tolerance(self, inputs: Inputs) -> float:
        """Return the relative difference of two losses that counts as none, in the precision that they are made in.

        A trainer or a wrapped `forward` enters autocast by itself, so the dtypes of what is computed are looked at.
        """
        tf32 = torch.get_float32_matmul_precision() != "highest"
        self._is_coarse = tf32 or any(one.dtype in _SHORT for one in self._model.parameters())
        self.ignored = next((call.ignored for call in self.see(inputs).calls if call.ignored is not None), IGNORED)
        return COARSE if self._is_coarse else PRECISE

    def see(self, inputs: Inputs) -> Seen:
        """Return the loss of one batch."""
        copy = {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}
        with torch.no_grad(), LossTap() as tap:
            loss = self._loss_of(copy)
        self._is_coarse |= tap.is_coarse
        auxiliary = {kind: float(value) for kind, value in self._tap.take().items()}
        precise = COARSE if loss.dtype in _SHORT else PRECISE
        return Seen(loss=float(loss), calls=tap.calls, auxiliary=auxiliary, precise=precise)


def _from_calls(watch: _Watch, batch: Inputs) -> LossForm | None:
    """Return the form that torch's own loss functions show; None where they do not make up the loss."""
    variants = list(vary_labels(batch, watch.ignored))
    seen = [watch.see(variant) for variant in variants]
    if not all(one.calls for one in seen):
        return None
    made, auxiliary = _explain(seen, max(one.precise for one in seen))
    if made is None:
        return None
    for numbers in _list_numbers(made, seen):
        rule = next(_match_rules(variants, numbers, seen), None)
        if rule is not None:
            return LossForm(rule=rule, reduction="sum" if made == "sum" else "mean", auxiliary=auxiliary)
    return None


def _list_numbers(made: str, seen: Sequence[Seen]) -> Iterator[list[float]]:
    """Yield what the loss may average over in each variant: terms of a call, of all calls together, or calls (rows).

    Raises:
        InseparableLoss: means over different counts are added.
    """
    counts = [[call.num_terms for call in one.calls] for one in seen]
    alike = all(len(set(found)) == 1 for found in counts)
    if alike:
        yield [found[0] for found in counts]
    elif made == "mean":
        terms = " and ".join(f"{number:g}" for number in sorted(set(counts[0])))
        raise InseparableLoss(
            reason=f"the loss adds means over different counts ({terms} terms in one batch)",
            advice="return one mean, or keep the micro-batch at the whole batch",
        )
    if alike or made != "mean of means":
        yield [sum(found) for found in counts]
    if made == "mean of means":
        yield [len(found) for found in counts]


def _match_rules(variants: Sequence[Inputs], numbers: Sequence[float], seen: Sequence[Seen]) -> Iterator[CountingRule]:
    """Yield the rules that count in every variant what the loss was seen to count."""
    ignored = tuple({call.ignored for one in seen for call in one.calls if call.ignored is not None})
    for rule in list_rules(variants[0], ignored):
        counts = [int(rule.count(variant)) for variant in variants]
        if counts == list(numbers):
            yield rule
        elif rule == ROWS and all(number % count == 0 for number, count in zip(numbers, counts, strict=True)):
            yield rule  # as many terms in each row: labels of a regression


def _explain(seen: Sequence[Seen], precise: float) -> tuple[Any, tuple[tuple[str, float], ...]]:
    """Return how the calls make up the loss, and what auxiliary part the rest is; None if they do not."""
    sums = {
        "mean": (lambda calls: sum(call.value for call in calls)),
        "mean of means": (lambda calls: sum(call.value for call in calls) / len(calls)),
        "sum": (lambda calls: sum(call.value * call.num_terms for call in calls)),
        "pooled": (lambda calls: sum(call.value * call.num_terms for call in calls) / sum(c.num_terms for c in calls)),
    }
    for name, made_of in sums.items():
        rest = [one.loss - made_of(one.calls) for one in seen]
        if all(abs(left) <= precise * abs(one.loss) for left, one in zip(rest, seen, strict=True)):
            return name, ()
    rest = [one.loss - sums["mean"](one.calls) for one in seen]
    return _explain_rest(rest, seen, precise)


def _explain_rest(rest: Sequence[float], seen: Sequence[Seen], precise: float) -> Any:
    """Return the coefficient of the one auxiliary loss that is the rest; None if there is none or it varies."""
    kinds = {kind for one in seen for kind, value in one.auxiliary.items() if value}
    if len(kinds) != 1:
        return None, ()
    kind = kinds.pop()
    found = [left / one.auxiliary[kind] for left, one in zip(rest, seen, strict=True)]
    spread = max(found) - min(found)
    return ("mean", ((kind, found[0]),)) if spread <= 100 * precise * abs(found[0]) else (None, ())


def _from_labels(watch: _Watch, batch: Inputs, precise: float) -> LossForm | None:
    """Return the rule under which some labels and some others give the loss of both."""
    parts = split_labels(batch)
    if parts is None:
        return None
    seen = [watch.see(part) for part in parts]
    if abs(seen[1].loss - seen[2].loss) <= 10 * PRECISE * abs(seen[0].loss):
        return None  # the labels make no difference, and every rule would do
    rule = _find_nearest([rule for rule in list_rules(parts.whole) if rule != ROWS], parts, seen, precise)
    return None if rule is None else LossForm(rule=rule)


def _from_parts(watch: _Watch, trials: Sequence[Parts], precise: float) -> LossForm:
    """Return the rule under which the parts of a batch give the whole."""
    if not trials:
        raise InseparableLoss(
            reason="one row is not enough to see what the loss averages over",
            advice="give a dataset that can be indexed, or two sequences in the first micro-batch",
        )
    for parts in trials:
        seen = [watch.see(part) for part in parts]
        rules = [ROWS, *(rule for rule in list_rules(parts.whole) if rule != ROWS)]
        rule = _find_nearest(rules, parts, seen, precise)
        if rule is not None:
            return LossForm(rule=rule)
        if abs(seen[1].loss + seen[2].loss - seen[0].loss) <= precise * abs(seen[0].loss):
            return LossForm(rule=ROWS, reduction="sum")
    raise InseparableLoss(
        reason="no count makes the loss of a batch the weighted mean of its parts' losses",
        advice="in-batch negatives: brim.accumulate_contrastive; a KL baseline or batch statistics: keep the "
        "micro-batch at the whole batch",
    )  # fmt: skip


def _find_nearest(
    rules: Sequence[CountingRule], parts: Parts, seen: Sequence[Seen], precise: float
) -> CountingRule | None:  # fmt: skip
    """Return the rule under which the parts come nearest to the whole, the first of equals; None if none comes near.

    In 16 bit the tolerance is so wide that a rule which is wrong may lie within it; the right one lies nearer.
    """
    scale = max(abs(seen[0].loss), 1e-3)
    far = [max(_distance(LossForm(rule=rule), parts, seen) / scale, PRECISE) for rule in rules]
    return rules[far.index(min(far))] if far and min(far) <= precise else None


def _distance(form: LossForm, parts: Parts, seen: Sequence[Seen]) -> float:
    """Return how far the whole is from what its parts predict; auxiliary parts are left out on both sides."""
    whole, first, second = (one.loss - _auxiliary(form, one) for one in seen)
    if form.reduction == "sum":
        return abs(whole - first - second)
    counts = [int(form.rule.count(part)) for part in parts[1:]]
    if not all(counts):
        return float("inf")
    return abs(whole - (counts[0] * first + counts[1] * second) / sum(counts))


def _auxiliary(form: LossForm, seen: Seen) -> float:
    return sum(coefficient * seen.auxiliary.get(kind, 0.0) for kind, coefficient in form.auxiliary)


def _confirm(
    watch: _Watch, form: LossForm, trials: Sequence[Parts], precise: float, coefficients: Sequence[float]
) -> LossForm:
    """Return the form once the parts of a batch give the whole; auxiliary coefficients are found on the way."""
    form = replace(form, auxiliary=tuple((kind, _round_to(value, coefficients)) for kind, value in form.auxiliary))
    nearest = float("inf")
    for parts in trials:
        try:
            seen = [watch.see(part) for part in parts]
        except (RuntimeError, ValueError, IndexError, KeyError):  # rows that cannot be cut this way
            continue
        found = form if form.auxiliary else _add_auxiliary(form, parts, seen, precise, coefficients)
        distance = _distance(found, parts, seen) / max(abs(seen[0].loss), 1e-3)
        if distance <= precise and (found == form or _holds(watch, found, parts, precise, coefficients)):
            return found
        nearest = min(nearest, distance)
    if nearest == float("inf"):
        return form
    raise InseparableLoss(
        reason=f"the loss of a batch is {nearest:.1e} off the mean of its parts over {form.rule}",
        advice="keep the micro-batch at the whole batch, or take the part that looks across sequences out of the loss",
    )


def _holds(
    watch: _Watch, form: LossForm, parts: Parts, precise: float, coefficients: Sequence[float]
) -> bool:  # fmt: skip
    """Return whether a coefficient that was fitted to one cut of a batch is declared, or explains another cut as well.

    One number always explains one cut: in-batch negatives would pass for a router's loss.
    """
    if all(coefficient in coefficients for _, coefficient in form.auxiliary):
        return True
    again = repeat_rows(parts)
    seen = [watch.see(part) for part in again]
    return _distance(form, again, seen) <= 10 * precise * max(abs(seen[0].loss), 1e-3)


def _add_auxiliary(
    form: LossForm, parts: Parts, seen: Sequence[Seen], precise: float, coefficients: Sequence[float]
) -> LossForm:
    """Return the form with the coefficient of an auxiliary loss that somebody outside the model adds."""
    kinds = {kind for one in seen for kind, value in one.auxiliary.items() if value}
    if len(kinds) != 1 or _distance(form, parts, seen) <= precise * abs(seen[0].loss):
        return form
    kind = kinds.pop()
    counts = [int(form.rule.count(part)) for part in parts[1:]]
    shares = (1.0, *(-count / max(sum(counts), 1) for count in counts))
    over = sum(share * one.loss for share, one in zip(shares, seen, strict=True))
    under = sum(share * one.auxiliary[kind] for share, one in zip(shares, seen, strict=True))
    return replace(form, auxiliary=((kind, _round_to(over / under, coefficients)),)) if under else form


def _round_to(value: float, declared: Sequence[float]) -> float:
    """Return the declared coefficient next to a measured one; the measured one if none is within 2 %."""
    near = [one for one in declared if abs(one - value) <= 0.02 * abs(value)]
    return min(near, key=lambda one: abs(one - value)) if near else value

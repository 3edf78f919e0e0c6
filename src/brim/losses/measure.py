"""Measure what a loss averages over, on the model that is trained, never by the name of its class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from torch import nn

from brim.errors import InseparableLoss
from brim.losses.form import LossForm
from brim.losses.rules import ROWS, CountingRule, count_rows, list_masks, list_rules
from brim.losses.views import Inputs, Parts, repeat_row, split_labels, split_rows, vary_labels
from brim.losses.watch import PRECISE, LossOf, LossWatch, Seen, stirred

_STIRS = (3.0, 1 / 3)
"""Ways to stir a model: a baseline that is cut off at 0 (KTO's KL) is 0 in one of them, and hides there."""
_ADVICE = (
    "in-batch negatives: brim.accumulate_contrastive; a KL baseline, batch statistics or a sum of means over different "
    "things: keep the micro-batch at the whole batch"
)
Auxiliary = tuple[tuple[str, float], ...]
"""Kind and coefficient of each auxiliary loss."""


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
    with LossWatch(loss_of, model) as watch:
        precise = watch.find_tolerance(batch)
        outer = tuple((kind, _round_to(c, coefficients)) for kind, c in watch.outer_coefficients(batch).items())
        trials = [*split_rows(batch), *parts]
        form = _from_calls(watch, batch, coefficients) or _from_labels(watch, batch, precise, outer)
        if form is None:
            return _from_parts(watch, trials, precise, outer)
        _confirm(watch, form, trials, precise)
        return form


def refuse_batch_norm(model: nn.Module) -> None:
    """Raise InseparableLoss if a trained layer normalises over the micro-batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise InseparableLoss(
                reason=f"batch-norm layer {name} normalises over the micro-batch",
                advice="freeze its statistics (.eval()) or use group norm, or keep the micro-batch at the whole batch",
            )


def _from_calls(watch: LossWatch, batch: Inputs, coefficients: Sequence[float]) -> LossForm | None:
    """Return the form that torch's own loss functions show; None where they do not make up the loss."""
    variants = list(vary_labels(batch, watch.ignored))
    seen = [watch.see(variant) for variant in variants]
    if count_rows(batch) == 1 and all(call.num_terms == 1 for one in seen for call in one.calls):
        variants = [repeat_row(variant) for variant in variants]
        seen = [watch.see(variant) for variant in variants]
    if not all(one.calls for one in seen):
        return None
    made, auxiliary = _explain(seen, max(one.precise for one in seen))
    if made is None:
        return None
    auxiliary = tuple((kind, _round_to(value, coefficients)) for kind, value in auxiliary)
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
    by_rows = _counts(ROWS, variants) == list(numbers)
    for rule in list_rules(variants[0], ignored):
        if by_rows and rule.key is not None and variants[0][rule.key].dim() > 1:
            continue  # rows with a target each, so short that their labels count the same
        if rule == ROWS:  # a loss over every token that is no padding, whatever its labels say
            yield from (mask for mask in list_masks(variants[0]) if _counts(mask, variants) == list(numbers))
        counts = _counts(rule, variants)
        if counts == list(numbers):
            yield rule
        elif rule == ROWS and all(number % count == 0 for number, count in zip(numbers, counts, strict=True)):
            yield rule  # as many terms in each row: labels of a regression


def _counts(rule: CountingRule, variants: Sequence[Inputs]) -> list[int]:
    return [int(rule.count(variant)) for variant in variants]


def _explain(seen: Sequence[Seen], precise: float) -> tuple[Any, tuple[tuple[str, float], ...]]:
    """Return how the calls make up the loss, and what auxiliary part the rest is; None if they do not."""
    sums = {
        "mean": (lambda calls: sum(call.value for call in calls)),
        "mean of means": (lambda calls: sum(call.value for call in calls) / len(calls)),
        "sum": (lambda calls: sum(call.value * call.num_terms for call in calls)),
        "pooled": (lambda calls: sum(c.value * c.num_terms for c in calls) / max(sum(c.num_terms for c in calls), 1)),
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


def _from_labels(watch: LossWatch, batch: Inputs, precise: float, outer: Auxiliary) -> LossForm | None:
    """Return the rule under which some labels and some others give the loss of both."""
    parts = split_labels(batch)
    if parts is None:
        return None
    seen = [watch.see(part) for part in parts.batches]
    if abs(seen[1].loss - seen[2].loss) <= 10 * PRECISE * abs(seen[0].loss):
        return None  # the labels make no difference, and every rule would do
    forms = [LossForm(rule=rule, auxiliary=outer) for rule in list_rules(parts.whole) if rule != ROWS]
    fitting, _ = _fitting_forms(forms, parts, seen, precise)
    return fitting[0] if fitting else None


def _from_parts(watch: LossWatch, trials: Sequence[Parts], precise: float, outer: Auxiliary) -> LossForm:
    """Return the rule under which the parts of a batch give the whole, and no other rule does.

    The smallest trained tensors are stirred meanwhile, in two ways: at its start a preference run has the same loss for
    every pair, and every count would explain that.
    """
    if not trials:
        raise InseparableLoss(
            reason="one row is not enough to see what the loss averages over",
            advice="give a dataset that can be indexed, or two sequences in the first micro-batch",
        )
    surer, less_sure = (_fit_stirred(watch, trials, precise, outer, factor) for factor in _STIRS)
    if surer[0] is not None and surer[0] == less_sure[0]:
        return surer[0]
    told_apart = surer[1] or less_sure[1]
    raise InseparableLoss(
        reason="no count makes the loss of a batch the weighted mean of its parts' losses"
        if told_apart else "its parts are too alike to tell what it averages over",
        advice=_ADVICE,
    )  # fmt: skip


def _fit_stirred(
    watch: LossWatch, trials: Sequence[Parts], precise: float, outer: Auxiliary, factor: float
) -> tuple[LossForm | None, bool]:
    """Return the form that alone explains a batch by its parts, and whether any trial could tell forms apart."""
    told_apart = False
    with stirred(watch.model, factor):
        for _, cuts in groupby(trials, key=lambda parts: parts.layout):
            common: list[LossForm] | None = None
            informative = False
            for parts in cuts:
                seen = watch.see_parts(parts)
                if seen is None:
                    break
                fitting, telling = _fitting_forms(_list_forms(parts, outer), parts, seen, precise)
                common = [form for form in fitting if common is None or form in common]
                informative |= telling
            told_apart |= informative
            if informative and common:
                return common[0], True
    return None, told_apart


def _list_forms(parts: Parts, outer: Auxiliary) -> list[LossForm]:
    """Return every form that a loss made out of sight may have, rows first."""
    rules = (ROWS, *(rule for rule in list_rules(parts.whole) if rule != ROWS))
    forms = [LossForm(rule=rule, auxiliary=outer) for rule in rules]
    return [*forms, LossForm(rule=ROWS, reduction="sum", auxiliary=outer)]


def _fitting_forms(
    forms: Sequence[LossForm], parts: Parts, seen: Sequence[Seen], precise: float
) -> tuple[list[LossForm], bool]:
    """Return the forms that give the whole, and whether all others miss it by far more than the noise.

    In 16 bit the tolerance is so wide that a rule which is wrong may lie within it; the right one lies nearer.
    """
    scale = max(abs(seen[0].loss), 1e-3)
    far = [_distance(form, parts, seen) / scale for form in forms]
    nearest = min(far, default=float("inf"))
    near = max(1.5 * nearest, PRECISE)
    if nearest > precise:
        return [], True
    fitting = [form for form, one in zip(forms, far, strict=True) if one <= near]
    alike = {_share(form, parts) for form in fitting}
    others = [one for form, one in zip(forms, far, strict=True) if _share(form, parts) not in alike]
    return fitting, len(alike) <= 1 and len(others) > 0 and min(others) > max(3 * nearest, 5 * PRECISE)


def _share(form: LossForm, parts: Parts) -> float:
    """Return the weight of the first part: forms that weigh alike are the same to a trial."""
    counts = [int(form.rule.count(part)) for part in parts.batches[1:]]
    return -1.0 if form.reduction == "sum" else counts[0] / max(sum(counts), 1)


def _distance(form: LossForm, parts: Parts, seen: Sequence[Seen]) -> float:
    """Return how far the whole is from what its parts predict; auxiliary parts are left out on both sides."""
    whole, first, second = (one.loss - _auxiliary(form, one) for one in seen)
    if form.reduction == "sum":
        return abs(whole - first - second)
    counts = [int(form.rule.count(part)) for part in parts.batches[1:]]
    if not all(counts):
        return float("inf")
    return abs(whole - (counts[0] * first + counts[1] * second) / sum(counts))


def _auxiliary(form: LossForm, seen: Seen) -> float:
    return sum(coefficient * seen.auxiliary.get(kind, 0.0) for kind, coefficient in form.auxiliary)


def _confirm(watch: LossWatch, form: LossForm, trials: Sequence[Parts], precise: float) -> None:
    """Raise InseparableLoss unless the parts of a batch give the whole, where it can be cut at all."""
    nearest = float("inf")
    for _, cuts in groupby(trials, key=lambda parts: parts.layout):
        pairs = [(parts, watch.see_parts(parts)) for parts in cuts]
        far = [_distance(form, parts, seen) / max(abs(seen[0].loss), 1e-3) for parts, seen in pairs if seen is not None]
        nearest = min(nearest, max(far, default=float("inf")))
    if precise < nearest < float("inf"):
        raise InseparableLoss(
            reason=f"the loss of a batch is {nearest:.1e} off the mean of its parts over {form.rule}",
            advice=_ADVICE,
        )


def _round_to(value: float, declared: Sequence[float]) -> float:
    """Return the declared coefficient next to a measured one; the measured one if none is within 2 %."""
    near = [one for one in declared if abs(one - value) <= 0.02 * abs(value)]
    return min(near, key=lambda one: abs(one - value)) if near else value

"""What the numbers of a running job say: pure functions from what was seen to verdicts, each with what would work."""

from __future__ import annotations

import math
from collections.abc import Callable

from brim.runtime.sight import Fact, Severity, Sight, Verdict
from brim.units import MIB, format_size

MOST_ABOVE_ESTIMATE, LEAST_BELOW_ESTIMATE = 1.10, 0.70
"""Measured over predicted peak that is worth a word: nine of ten published runs are within 5 % of the estimate."""
GROWTH_FRACTION, SLACK_FRACTION = 0.03, 0.10
"""Of the card: growth of reserved memory beyond that of tensors, and reserved beyond tensors, that mean fragments.
A pool is 4-5 % larger than its tensors at the median and 9 % at the 90th percentile (`planner.budget`)."""
LEAST_GROWTH_BYTES = 64 * MIB
SLOW_FACTOR, SLOWING_FACTOR = 1.5, 1.3
"""Time over the estimate's, and over the run's own first steps, that is worth a word. Both are choices, not measured on
runs that went wrong: far enough above what lengths and a card's clock do to the time of a token in a run that is well,
near enough that a run of days is told before it has lost many hours. The estimate's time is itself unmeasured on most
cards, so it is given more room."""
MOST_PADDING_FRACTION, LEAST_STEPS_OF_PADDING = 0.30, 5
"""Share of padding that is worth a word, and steps before which one odd batch may decide it."""
MOST_LOSS_FACTOR = 1.5
"""First loss over ln(vocabulary), what a model that knows nothing has, that is worth a word. A choice: a sum over two
micro-batches is 2 at random weights, a mean 1; a pretrained model starts far below, where this does not see its sum."""
OUT_OF_ROOM = ("out_of_memory", "spill", "retries")
"""Verdicts that counters alone give, whatever was run."""
OF_A_SPLIT = (*OUT_OF_ROOM, "over_budget", "peak_ahead", "estimate_low", "estimate_high", "fragmentation")
"""Verdicts that are news again once the split is another one."""


def judge(sight: Sight) -> tuple[Verdict, ...]:
    """Return what the numbers say, the worst first."""
    found = [verdict for one in _JUDGES if (verdict := one(sight)) is not None]
    return tuple(sorted(found, key=lambda verdict: ("danger", "warning", "note").index(verdict.severity)))


def judge_budget(sight: Sight) -> Verdict | None:
    """Whether the peak is, or will be at the longest sequence still to come, above the budget."""
    peak, budget, coming = sight.peak_allocated_bytes, sight.budget_bytes, sight.coming_peak_bytes
    if peak is None or budget is None:
        return None
    if peak > budget:
        text = f"tensors peaked at {format_size(peak)}{_on_rank(sight)}, above the budget of {format_size(budget)}"
        return _verdict(sight, "over_budget", "warning", text, _advise_fit(sight), peak_allocated_bytes=peak,
                        budget_bytes=budget, **_fit_facts(sight))  # fmt: skip
    if coming is None or coming <= budget or (sight.coming_tokens or 0) <= (sight.seen_tokens or 0):
        return None
    over = sight.capacity_bytes is not None and coming > sight.capacity_bytes
    text = (
        f"the longest sequence still to come, {sight.coming_tokens:,} tokens, will take {format_size(coming)}, above "
        f"the budget of {format_size(budget)}{' and the card' if over else ''}: {format_size(peak)} were measured at "
        f"{sight.seen_tokens:,} tokens{_on_rank(sight)}, {sight.ratio:.2f} times the estimate{_name_scores(sight)}"
    )
    facts = {
        "coming_peak_bytes": coming, "budget_bytes": budget, "coming_tokens": sight.coming_tokens,
        "peak_allocated_bytes": peak, "seen_tokens": sight.seen_tokens, "ratio": sight.ratio, **_fit_facts(sight),
    }  # fmt: skip
    return _verdict(sight, "peak_ahead", "danger" if over else "warning", text, _advise_fit(sight), **facts)


def judge_evaluation(sight: Sight) -> Verdict | None:
    """Whether evaluation, or saving, takes more than the budget while training steps do not."""
    peak, aside, budget = sight.peak_allocated_bytes, sight.aside_bytes, sight.budget_bytes
    if peak is None or aside is None or budget is None or peak > budget or aside <= budget:
        return None
    text = (
        f"tensors peaked at {format_size(aside)} in evaluation or saving{_on_rank(sight)}, above the budget of "
        f"{format_size(budget)}; training steps take {format_size(peak)}"
    )
    return _verdict(sight, "evaluation_over_budget", "warning", text, "take a smaller per_device_eval_batch_size",
                    aside_bytes=aside, peak_allocated_bytes=peak, budget_bytes=budget)  # fmt: skip


def judge_estimate(sight: Sight) -> Verdict | None:
    """Whether the peak is not what was predicted for the same lengths."""
    peak, said, ratio = sight.peak_allocated_bytes, sight.seen_estimate_bytes, sight.ratio
    if ratio is None or peak is None or said is None or LEAST_BELOW_ESTIMATE <= ratio <= MOST_ABOVE_ESTIMATE:
        return None
    low = ratio > 1
    if not low and (sight.coming_peak_bytes or 0) > (sight.budget_bytes or math.inf):
        return None  # there is no room for what comes
    text = (
        f"tensors peaked at {format_size(peak)} at {sight.seen_tokens:,} tokens{_on_rank(sight)}, the estimate says "
        f"{format_size(said)}: {ratio:.2f} times as much"
    )
    advice = (
        _explain_low(sight) if low else "there is room for a larger micro-batch: plan again by trace"
    )  # fmt: skip
    return _verdict(sight, "estimate_low" if low else "estimate_high", "warning" if low else "note", text, advice,
                    peak_allocated_bytes=peak, estimate_bytes=said, ratio=ratio,
                    seen_tokens=sight.seen_tokens)  # fmt: skip


def judge_fragmentation(sight: Sight) -> Verdict | None:
    """Whether the allocator holds more and more while tensors, those of evaluation among them, do not."""
    held, capacity = sight.peak_reserved_bytes, sight.capacity_bytes
    before, first = sight.first_reserved_bytes, sight.first_allocated_bytes
    if sight.peak_allocated_bytes is None or held is None or capacity is None or before is None or first is None:
        return None
    peak = max(sight.peak_allocated_bytes, sight.aside_bytes or 0)
    growth = (held - before) - max(0, peak - first)
    least = max(LEAST_GROWTH_BYTES, math.ceil(GROWTH_FRACTION * capacity))
    if growth < least or held - peak < SLACK_FRACTION * capacity:
        return None
    text = (
        f"reserved memory crept from {format_size(before)} at step {sight.first_step} to {format_size(held)} of "
        f"{format_size(capacity)} while tensors peak at {format_size(peak)}: fragmentation"
    )
    advice = (
        "segments are expandable already: pad lengths to a multiple of 64, so that sizes come back"
        if sight.expandable else f"start with {sight.allocator_variable}=expandable_segments:True"
    )  # fmt: skip
    return _verdict(sight, "fragmentation", "warning", text, advice, first_reserved_bytes=before,
                    peak_reserved_bytes=held, peak_allocated_bytes=peak, capacity_bytes=capacity)  # fmt: skip


def judge_allocator(sight: Sight) -> Verdict | None:
    """Whether the card is too small already: emptied pools, or memory that the driver lent from the host."""
    held, capacity = sight.peak_reserved_bytes, sight.capacity_bytes
    if held is not None and capacity is not None and held > capacity:
        text = (
            f"{format_size(held)} are reserved on a card of {format_size(capacity)}: the rest lies in host memory, and "
            "every step waits for it"
        )
        return _verdict(sight, "spill", "danger", text, _advise_fit(sight), peak_reserved_bytes=held,
                        capacity_bytes=capacity, **_fit_facts(sight))  # fmt: skip
    if not sight.num_retries:
        return None
    times = f"{sight.num_retries} time{'s' if sight.num_retries != 1 else ''}"
    text = f"the allocator had to empty its pool {times} in {sight.step} steps: the card is full, and each costs a wait"
    return _verdict(sight, "retries", "warning", text, _advise_fit(sight), num_retries=sight.num_retries,
                    **_fit_facts(sight))  # fmt: skip


def judge_refusals(sight: Sight) -> Verdict | None:
    """Whether memory ran out."""
    if not sight.num_ooms:
        return None
    times = f"{sight.num_ooms} allocation{'s were' if sight.num_ooms != 1 else ' was'}"
    text = f"{times} refused in {sight.step} steps: memory ran out{_on_rank(sight)}"
    return _verdict(sight, "out_of_memory", "danger", text, _advise_fit(sight), num_ooms=sight.num_ooms,
                    **_fit_facts(sight))  # fmt: skip


def judge_speed(sight: Sight) -> Verdict | None:
    """Whether a step takes much longer than predicted for its tokens."""
    took, said = sight.step_seconds, sight.estimate_seconds
    if took is None or not said or took < SLOW_FACTOR * said:
        return None
    text = f"a step takes {took:.3g} s, the estimate says {said:.3g} s for its tokens: {took / said:.1f} times as long"
    advice = "look at data loading, at other programs on the card, and at its clock (nvidia-smi -q -d PERFORMANCE)"
    return _verdict(sight, "slow", "warning", text, advice, step_seconds=took, estimate_seconds=said)


def judge_slowing(sight: Sight) -> Verdict | None:
    """Whether tokens take longer than in the run's own first steps."""
    now, first = sight.token_seconds, sight.first_token_seconds
    if now is None or not first or now < SLOWING_FACTOR * first:
        return None
    text = f"the run slowed down: {1 / now:,.0f} tokens/s, padding included, after {1 / first:,.0f} in its first steps"
    advice = "the card is throttled or shared, data loading falls behind, or memory spills to the host"
    return _verdict(sight, "slowing", "warning", text, advice, token_seconds=now, first_token_seconds=first)


def judge_padding(sight: Sight) -> Verdict | None:
    """Whether much of the work is padding."""
    share, real = sight.padding_fraction, sight.tokens_per_second
    if share is None or share < MOST_PADDING_FRACTION or sight.step < LEAST_STEPS_OF_PADDING:
        return None
    speed = f": {real:,.0f} real tokens/s of {real / (1 - share):,.0f}" if real and share < 1 else ""
    text = f"{100 * share:.0f} % of the tokens that are run are padding{speed}"
    advice = "group sequences by length, pack them, or run padding-free"
    return _verdict(sight, "padding", "warning", text, advice, padding_fraction=share,
                    **({"tokens_per_second": real} if real else {}))  # fmt: skip


def judge_loss(
    step: int, loss: float, mean_loss: float, num_micro_batches: int
) -> Verdict | None:  # fmt: skip
    """Return whether the loss that is trained on is the sum over micro-batches, not their mean.

    Args:
        step: optimizer step.
        loss: of the step, as the loop adds it up.
        mean_loss: mean over the terms that the loss functions averaged over, micro-batch by micro-batch.
        num_micro_batches: micro-batches that both are made of.
    """
    k = num_micro_batches
    if k < 2 or not (math.isfinite(loss) and math.isfinite(mean_loss)) or mean_loss <= 0:
        return None
    ratio = loss / mean_loss
    if not (1 + k) / 2 < ratio < 2 * k:
        return None
    text = (
        f"the loss of step {step} is {loss:.3f}, {ratio:.2f} times the {mean_loss:.3f} that its {k} micro-batches "
        f"average to: gradients are {ratio:.2f} times too large"
    )
    return _loss_verdict(step, text, loss=loss, mean_loss=mean_loss, num_micro_batches=k)


def judge_first_loss(step: int, loss: float, vocab_size: int, num_micro_batches: int) -> Verdict | None:
    """Return whether a first loss is above what a model that knows nothing has: ln(vocabulary).

    Args:
        step: optimizer step.
        loss: of the step, as the loop logs it.
        vocab_size: words the model chooses from.
        num_micro_batches: accumulation steps.
    """
    if num_micro_batches < 2 or vocab_size < 2 or not math.isfinite(loss):
        return None
    nothing = math.log(vocab_size)
    if loss <= MOST_LOSS_FACTOR * nothing:
        return None
    text = (
        f"the loss of step {step} is {loss:.3f}; a model that knows nothing of {vocab_size:,} words has {nothing:.3f}: "
        f"it may be the sum over {num_micro_batches} micro-batches, and gradients too large by as much"
    )
    return _loss_verdict(step, text, loss=loss, uniform_loss=nothing, num_micro_batches=num_micro_batches)


def _loss_verdict(step: int, text: str, **facts: Fact) -> Verdict:
    advice = "brim.guard(trainer) or brim.accumulate makes accumulation exact"
    return Verdict(code="loss_scale", severity="danger", text=f"{text}; {advice}", step=step, facts=facts)


def judge_split(
    step: int, *, ran: tuple[int, int, int], planned: tuple[int, int, int], effective: int
) -> Verdict | None:
    """Return whether the trainer runs another split than the plan.

    Args:
        step: optimizer step.
        ran: micro-batch size, accumulation steps and data-parallel ranks of the trainer.
        planned: the same of the plan.
        effective: the plan's effective batch, sequences.
    """
    if ran == planned:
        return None
    product = math.prod(ran)
    same = product == effective
    text = f"the trainer runs {_name_split(ran)}, the plan says {_name_split(planned)}"
    advice = "the effective batch is the same" if same else "export the plan again: the effective batch is another one"
    names = ("micro_batch_size", "gradient_accumulation_steps", "num_ranks")
    return Verdict(code="split", severity="note" if same else "warning", text=f"{text}; {advice}", step=step,
                   facts={**dict(zip(names, ran, strict=True)), "effective_batch_size": product,
                          "planned_batch_size": effective})  # fmt: skip


def _name_split(split: tuple[int, int, int]) -> str:
    micro, steps, ranks = split
    words = f"micro-batch {micro} x accumulation {steps} x {ranks} rank{'s' if ranks != 1 else ''}"
    return f"{words} = {math.prod(split)} sequences"


def _verdict(sight: Sight, code: str, severity: Severity, text: str, advice: str, **facts: Fact | None) -> Verdict:
    kept = {name: value for name, value in facts.items() if value is not None}
    return Verdict(
        code=code, severity=severity, text=f"{text}; {advice}" if advice else text, step=sight.step, facts=kept
    )


def _name_scores(sight: Sight) -> str:
    return ", as if attention kept its scores (is it eager?)" if sight.scores_share is not None else ""


def _explain_low(sight: Sight) -> str:
    if sight.scores_share is not None:
        return (
            "that fits attention that keeps its scores: eager, or sdpa that finds no fused kernel (dropout on a CPU, a "
            "bias that learns); it grows with the square of the length"
        )
    return (
        "what holds more than the plan knows is a second model, a callback, or a setting the trainer does not share "
        "with the plan"
    )


def _on_rank(sight: Sight) -> str:
    return f" on rank {sight.rank}" if sight.rank else ""


def _advise_fit(sight: Sight) -> str:
    """Return what would stay within the budget, or what usually does where nobody can say."""
    fit, ways = sight.fitting, []
    if fit.micro_batch_size is not None:
        ways.append(f"micro-batch {fit.micro_batch_size} x accumulation {fit.gradient_accumulation_steps}")
    if fit.activation_checkpointing is not None:
        ways.append(f"{fit.activation_checkpointing} activation checkpointing")
    if fit.longest_tokens is not None:
        ways.append(f"sequences cut at {fit.longest_tokens:,} tokens")
    if ways:
        return f"what fits: {', or '.join(ways)}"
    smaller = "a smaller micro-batch, " if sight.micro_batch_size > 1 else ""
    return f"take {smaller}more checkpointing or shorter sequences"


def _fit_facts(sight: Sight) -> dict[str, Fact | None]:
    fit = sight.fitting
    return {
        "fitting_tokens": fit.longest_tokens, "fitting_micro_batch_size": fit.micro_batch_size,
        "fitting_accumulation_steps": fit.gradient_accumulation_steps,
        "fitting_checkpointing": fit.activation_checkpointing,
    }  # fmt: skip


_JUDGES: tuple[Callable[[Sight], Verdict | None], ...] = (
    judge_refusals, judge_allocator, judge_budget, judge_evaluation, judge_estimate, judge_fragmentation, judge_speed,
    judge_slowing, judge_padding,
)  # fmt: skip

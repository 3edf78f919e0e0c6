"""Who is asked what a strategy costs: callables as values, so that a probe plugs in like the formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from brim.cost.ledger import Estimate, Source
from brim.cost.timeline import Timeline
from brim.planner.budget import Budget, find_budget
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.units import format_size

Peak = Callable[[Workload, Strategy], int]
Seconds = Callable[[Workload, Strategy], float | None]

RECOMPUTED_FORWARD = {"none": 0.0, "selective": 0.9, "full": 1.0}
"""Share of the forward pass that is run again. `selective` runs nearly all again: only attention outputs are kept."""
KNEE_TOKENS = 256
"""Tokens of a micro-batch at which launches cost as much as products do; see `relative_cost`."""
ORDER_TEXT = "no speed is known for this set-up: ranked by recomputation and by tokens per micro-batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answerer:
    """One way to answer `(Workload, Strategy) -> Estimate`, and its two cheap halves for the search."""

    source: Source
    """Name of the answerer."""
    estimate: Callable[[Workload, Strategy], Estimate]
    """The whole answer, for what is shown."""
    peak: Peak
    """Only the allocated peak, bytes; what the search asks."""
    moment: Callable[[Workload, Strategy], str]
    """Only the name of the moment of the peak; the whole answer takes a thousand times longer."""
    seconds: Seconds
    """Seconds of one optimizer step; None when the device's speed is unknown."""
    budget: Callable[[Workload], Budget]
    """Bytes a plan may use on the workload's device."""
    order: Callable[[Workload, Strategy], float]
    """Relative cost that ranks strategies when seconds are unknown."""
    order_text: str
    """What `order` prefers, in words."""
    speed_source: str = "formula (unmeasured on this card)"
    """Who says what `seconds` says."""
    basis: tuple[str, ...] = ()
    """What the answers rest on beside the answerer itself, one sentence each."""
    confirm: Callable[[Workload, Strategy, bool], bool] | None = None
    """Looks closer at a strategy, exactly or at its kind, so that `peak` and `moment` answer better from now on; False
    if there was nothing left to do. None for answerers whose first answer is their best."""
    largest: Callable[[Workload, Strategy, int], int | None] | None = None
    """Largest micro-batch of a strategy, accumulated, whose peak is within some bytes; None if it was not solved. None
    for answerers that solve nothing."""
    is_dear: Callable[[Workload], bool] = lambda workload: False
    """Whether each new kind of strategy takes seconds to answer, so that only what may win is asked for."""
    timeline: Callable[[Workload, Strategy], Timeline] | None = None
    """Memory over the step; None for answerers that do not follow it."""


def relative_cost(workload: Workload, strategy: Strategy) -> float:
    """Return a stand-in for step time on a device without known rates: for ranking only, never shown.

    Passes over the weights (forward 1, backward 2, or 1 when the base is frozen, plus what is recomputed), times
    `1 + knee / tokens of a micro-batch`: small micro-batches pay launches, and 4-bit weights are unpacked once
    per micro-batch, which doubles the knee.

    Source: shape of the law as in cost/steptime.py. Measured per-layer launch cost is worth 100-700 tokens of a
    7B layer between an RTX 4090 and an H100 (NNLS on 129 published rows); 256 is between.
    """
    recipe = workload.recipe
    passes = (3.0 if recipe.method == "full" else 2.0) + RECOMPUTED_FORWARD[strategy.activation_checkpointing]
    knee = KNEE_TOKENS * (2 if recipe.quantization else 1)
    return passes * (1 + knee / (strategy.micro_batch_size * workload.data.seq_len))


def answer_by_formula() -> Answerer:
    """Return the formula as an answerer."""
    from brim.cost.estimate import estimate, peak_bytes, profile_strategy
    from brim.cost.steptime import seconds

    def moment(workload: Workload, strategy: Strategy) -> str:
        tokens = strategy.micro_batch_size * (workload.model.sequence_tokens or workload.data.seq_len)
        return max(profile_strategy(workload, strategy).rows, key=lambda row: row.total.at(tokens)).name

    return Answerer(
        source="formula", estimate=estimate, peak=peak_bytes, moment=moment, seconds=seconds,
        budget=lambda workload: budget_of(workload, "formula"), order=relative_cost, order_text=ORDER_TEXT,
    )  # fmt: skip


def budget_of(workload: Workload, source: Source) -> Budget:
    """Return the budget on a workload's device for peaks of a source, which has its own margin."""
    from brim.cost.calibration import margin_fraction
    from brim.cost.overhead import context_bytes

    device = workload.cluster.device
    return find_budget(device, outside_bytes=context_bytes(device), margin_fraction=margin_fraction(source))


def answer_by_rule() -> Answerer:
    """Return the field's rule of thumb as an answerer: the card's memory alone, no speed."""
    from brim.cost.rule import card_gb, estimate_rule, rule_budget_bytes, rule_peak_bytes

    def budget(workload: Workload) -> Budget:
        budget_bytes = rule_budget_bytes(workload)
        return Budget(
            budget_bytes=budget_bytes, capacity_bytes=workload.cluster.device.plannable_bytes,
            sentence=f"budget {format_size(budget_bytes)}: model, {format_size(2e9)} and 90 % of "
            f"what they leave of {format_size(card_gb(workload) * 1e9)}",
        )  # fmt: skip

    return Answerer(
        source="rule", estimate=estimate_rule, peak=rule_peak_bytes, moment=lambda workload, strategy: "training",
        seconds=lambda workload, strategy: None, budget=budget,
        order=lambda workload, strategy: float(strategy.gradient_accumulation_steps),
        order_text="the rule of thumb knows no speed: the largest micro-batch that fits",
    )  # fmt: skip

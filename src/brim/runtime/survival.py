"""What recovery from an out-of-memory has made of a run: asked of whoever recovers, by its words alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from brim.runtime.sight import Verdict
from brim.spec.strategy import Strategy


class Survival(NamedTuple):
    """How a run goes on; between two that differ an out-of-memory was survived, or the split grew again."""

    num_events: int = 0
    """Out-of-memories survived so far."""
    micro_batch_size: int | None = None
    """Sequences of a piece now; None where micro-batches are run as they come."""
    checkpoints: bool = False
    """Whether activation checkpointing was turned on to go on."""
    last: str = ""
    """What was survived last, in words."""


Ask = Callable[[], Survival]


def read_survival(recovery: Any) -> Survival:
    """Return how a run goes on.

    Args:
        recovery: has `events`, a list, and `micro_batch_size` or `size`; None where nothing recovers.
    """
    events = getattr(recovery, "events", None) or ()
    size = getattr(recovery, "micro_batch_size", None) or getattr(recovery, "size", None)
    return Survival(
        num_events=len(events), micro_batch_size=size if isinstance(size, int) else None,
        checkpoints=any("checkpointing" in str(getattr(event, "change", "")) for event in events),
        last=str(events[-1]) if events else "",
    )  # fmt: skip


def follow(planned: Strategy, survival: Survival) -> Strategy:
    """Return how the planned strategy is run now: each micro-batch in pieces, the last of which may be smaller."""
    size, found = survival.micro_batch_size, planned
    if size is not None and 1 <= size < planned.micro_batch_size:
        pieces = -(-planned.micro_batch_size // size)
        steps = planned.gradient_accumulation_steps * pieces
        found = replace(planned, micro_batch_size=size, gradient_accumulation_steps=steps)
    if survival.checkpoints and found.activation_checkpointing == "none":
        found = replace(found, activation_checkpointing="full")
    return found


def describe_survival(step: int, survival: Survival, strategy: Strategy) -> Verdict:
    """Return what to say of an out-of-memory that was survived, and what the run is held against from now on."""
    size, steps = strategy.micro_batch_size, strategy.gradient_accumulation_steps
    text = (
        f"memory ran out and the run went on ({survival.last}); from here on it is compared with micro-batch {size} x "
        f"accumulation {steps}, {strategy.activation_checkpointing} checkpointing; plan again before the next run"
    )
    facts: dict[str, int | float | str] = {
        "micro_batch_size": size, "gradient_accumulation_steps": steps, "num_survived": survival.num_events,
        "activation_checkpointing": strategy.activation_checkpointing,
    }  # fmt: skip
    return Verdict(code="survived", severity="warning", text=text, step=step, facts=facts)

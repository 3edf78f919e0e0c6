"""What was not chosen, and why: a readable selection of neighbours with their price in time or bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from brim.planner.answerer import RECOMPUTED_FORWARD, Answerer
from brim.planner.candidates import knobs_of
from brim.planner.record import Rejected
from brim.planner.search import TIE_FRACTION, Costed, Found
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.units import format_size

MOST_ROWS = 12
_SMALLER_SPLITS = 3


def list_alternatives(workload: Workload, found: Found, answerer: Answerer) -> tuple[Rejected, ...]:
    """Return at most 12 strategies that were not chosen: those that fit by time, then those that do not by bytes.

    Shown are, of the chosen variant, the next smaller micro-batches and the first that is over budget; of every
    other variant the best that fits and the first that does not.
    """
    best = found.best
    if best is None:
        return ()
    fitting = [costed for costed in _select(found, best) if costed.peak_bytes <= found.budget_bytes]
    over = [costed for costed in _select(found, best) if costed.peak_bytes > found.budget_bytes]
    fitting.sort(key=lambda costed: (costed.cost, costed.peak_bytes))
    over.sort(key=lambda costed: costed.peak_bytes)
    room_for_over = min(len(over), max(MOST_ROWS // 2, MOST_ROWS - len(fitting)))
    rows = fitting[: MOST_ROWS - room_for_over] + over[:room_for_over]
    return tuple(_reject(workload, costed, best, found.budget_bytes, answerer) for costed in rows)


def _select(found: Found, best: Costed) -> list[Costed]:
    chosen: list[Costed] = []
    for variant, members in _by_variant((*found.fitting, *found.over)).items():
        fits = [costed for costed in members if costed.peak_bytes <= found.budget_bytes and costed is not best]
        over = [costed for costed in members if costed.peak_bytes > found.budget_bytes]
        if variant == knobs_of(best.strategy):
            fits.sort(key=lambda costed: abs(costed.strategy.micro_batch_size - best.strategy.micro_batch_size))
            chosen += fits[:_SMALLER_SPLITS]
        else:
            chosen += sorted(fits, key=lambda costed: (costed.cost, costed.peak_bytes))[:1]
        chosen += sorted(over, key=lambda costed: costed.peak_bytes)[:1]
    return chosen


def _by_variant(members: Iterable[Costed]) -> dict[Strategy, list[Costed]]:
    groups: dict[Strategy, list[Costed]] = {}
    for costed in members:
        groups.setdefault(knobs_of(costed.strategy), []).append(costed)
    return groups


def _reject(workload: Workload, costed: Costed, best: Costed, budget_bytes: int, answerer: Answerer) -> Rejected:
    over_bytes = costed.peak_bytes - budget_bytes
    if over_bytes > 0:
        moment = answerer.moment(workload, costed.strategy)
        reason = f"over by {format_size(over_bytes)} at {moment}"
    else:
        reason = _why_slower(costed, best)
    relative = None if costed.seconds is None or best.seconds is None else costed.seconds / best.seconds
    return Rejected(
        strategy=costed.strategy, over_bytes=max(0, over_bytes), reason=reason, peak_allocated_bytes=costed.peak_bytes,
        relative_step_time=relative,
    )


def _why_slower(costed: Costed, best: Costed) -> str:
    ratio = costed.cost / best.cost
    if abs(ratio - 1) <= TIE_FRACTION or ratio < 1:
        causes = _tie_causes(costed, best)
        if causes or ratio <= 1 or costed.peak_bytes >= best.peak_bytes:
            return f"as fast within {TIE_FRACTION:.0%}: {'; '.join(causes) or 'equal, and no power of two'}"
        # Lower, yet not chosen: it lies outside the tie with the fastest, of which the chosen one is part.
    price = f"{ratio:.2f}x slower" if costed.seconds is not None else "slower (by how much is unknown)"
    return f"{price}: {'; '.join(_causes(costed.strategy, best.strategy)) or 'its kernels take longer'}"


def _tie_causes(costed: Costed, best: Costed) -> list[str]:
    causes: list[str] = []
    if _recomputed(costed.strategy) > _recomputed(best.strategy):
        causes.append(f"{costed.strategy.activation_checkpointing} checkpointing, which is not needed")
    if costed.strategy.activation_offload and not best.strategy.activation_offload:
        causes.append("activations travel to host memory, which is not needed")
    if not causes and costed.peak_bytes > best.peak_bytes:
        causes.append(f"{format_size(costed.peak_bytes - best.peak_bytes)} more memory")
    return causes


def _causes(other: Strategy, best: Strategy) -> Sequence[str]:
    causes = []
    if _recomputed(other) > _recomputed(best):
        full = other.activation_checkpointing == "full"
        what = "the forward pass" if full else "nearly all of the forward pass, only attention outputs are kept"
        causes.append(f"{other.activation_checkpointing} checkpointing recomputes {what}")
    if other.micro_batch_size < best.micro_batch_size:
        causes.append(
            f"{other.gradient_accumulation_steps} micro-batches per step instead of "
            f"{best.gradient_accumulation_steps}, each with its own launches"
        )
    if other.activation_offload and not best.activation_offload:
        causes.append("activations travel to host memory")
    return causes


def _recomputed(strategy: Strategy) -> float:
    return RECOMPUTED_FORWARD[strategy.activation_checkpointing]

"""The formula asked about lengths: the peak at those that were run and at those still to come, and what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from brim.cost.estimate import peak_bytes
from brim.cost.overhead import workspace_bytes
from brim.errors import BrimError
from brim.planner.record import Plan
from brim.runtime.sight import Fitting, correct_peak
from brim.spec.device import hold_cpu
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

_ROUND_TOKENS = 64
_CPU = "cpu"


class Forecast:
    """Peaks of a plan's job by the formula, for any length; what it was asked once it remembers."""

    def __init__(self, plan: Plan, strategy: Strategy, device: str = "") -> None:
        """Ask about the job of a plan, run as `strategy` says on a device that its driver calls so."""
        self._plan, self.strategy = plan, strategy
        self._workload = place(plan.workload, device)
        moved = self._workload is not plan.workload and plan.estimate.source != "trial"
        lacks = workspace_bytes(plan.workload.cluster.device) if moved else 0
        self._said_bytes = max(1, plan.estimate.peak_allocated_bytes - lacks)
        self._known: dict[tuple[int, Strategy], int | None] = {}

    def peak(self, num_tokens: int, strategy: Strategy | None = None) -> int | None:
        """Return the peak allocated bytes where the longest sequence has `num_tokens`; None where nobody knows."""
        key = (num_tokens, strategy or self.strategy)
        if key not in self._known:
            self._known[key] = self._ask(*key)
        return self._known[key]

    def scores(self, num_tokens: int, strategy: Strategy | None = None) -> int:
        """Return how much more it would be if attention kept its scores, bytes; 0 where it cannot or does already.

        `sdpa` falls back to it without a word where no fused kernel takes the job: dropout on a CPU, an odd mask, a
        bias that learns.
        """
        strategy = strategy or self.strategy
        if strategy.attention_kernel != "sdpa":
            return 0
        fused = self.peak(num_tokens, strategy)
        kept = self.peak(num_tokens, replace(strategy, attention_kernel="eager"))
        return max(0, kept - fused) if kept is not None and fused is not None else 0

    def _ask(self, num_tokens: int, strategy: Strategy) -> int | None:
        if num_tokens == self._workload.data.seq_len and strategy == self._plan.strategy:
            return self._said_bytes  # by whoever the plan asked
        data = replace(self._workload.data, seq_len=num_tokens)
        try:
            found = peak_bytes(replace(self._workload, data=data), strategy)
            return self._follow_plan(found)
        except (BrimError, ArithmeticError, LookupError, ValueError):  # no model of the formula's
            return None

    def _follow_plan(self, found: int) -> int:
        """Return the bare formula's peak as the plan's own answerer would say it, which may be the formula corrected by
        measured runs: by what both say of the plan as it stands."""
        return correct_peak(found, peak_bytes(self._workload, self._plan.strategy), self._said_bytes)

    def find_fitting(
        self, correct: Callable[[int, int], int], budget_bytes: int, seen_tokens: int, coming_tokens: int
    ) -> Fitting:  # fmt: skip
        """Return what would keep the longest sequence still to come within the budget, each way by itself.

        Args:
            correct: returns a predicted peak in the light of what was measured, given what scores would add.
            budget_bytes: bytes that tensors may take.
            seen_tokens: longest sequence so far, which the cut need not be shorter than.
            coming_tokens: longest sequence still to come.
        """

        def fits(num_tokens: int, strategy: Strategy | None = None) -> bool:
            peak = self.peak(num_tokens, strategy)
            return peak is not None and correct(peak, self.scores(num_tokens, strategy)) <= budget_bytes

        split = next((one for one in self._list_splits() if fits(coming_tokens, one)), None)
        kind = next((one for one in self._list_checkpointings() if fits(coming_tokens, one)), None)
        return Fitting(
            longest_tokens=_find_longest(fits, seen_tokens, coming_tokens),
            micro_batch_size=split and split.micro_batch_size,
            gradient_accumulation_steps=split and split.gradient_accumulation_steps,
            activation_checkpointing=kind and kind.activation_checkpointing,
        )

    def _list_splits(self) -> Iterator[Strategy]:
        """Yield smaller micro-batches of the same effective batch, the largest first."""
        window = self.strategy.micro_batch_size * self.strategy.gradient_accumulation_steps
        for size in range(self.strategy.micro_batch_size - 1, 0, -1):
            if window % size == 0:
                yield replace(self.strategy, micro_batch_size=size, gradient_accumulation_steps=window // size)

    def _list_checkpointings(self) -> Iterator[Strategy]:
        kinds = ("none", "selective", "full")
        for kind in kinds[kinds.index(self.strategy.activation_checkpointing) + 1 :]:
            yield replace(self.strategy, activation_checkpointing=kind)


def place(workload: Workload, device: str, capacity_bytes: int | None = None) -> Workload:
    """Return the job on the device that it runs on: a CPU has neither context nor library workspaces."""
    planned = workload.cluster.device
    if device != _CPU or planned.vendor == _CPU:
        return workload
    host = hold_cpu(capacity_bytes or planned.capacity_bytes)
    return replace(workload, cluster=replace(workload.cluster, device=host))


def _find_longest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the largest multiple of 64 between two lengths that fits; None if none does."""
    first, last = -(-low // _ROUND_TOKENS), (high - 1) // _ROUND_TOKENS
    if first > last or not fits(first * _ROUND_TOKENS):
        return None
    while first < last:
        middle = (first + last + 1) // 2
        first, last = (middle, last) if fits(middle * _ROUND_TOKENS) else (first, middle - 1)
    return first * _ROUND_TOKENS

"""The trace as an answerer: the formula proposes, the trace confirms the few strategies that matter.

A search asks for the peak of hundreds of strategies; a trace takes a second or two. So the formula answers until a
strategy is about to be chosen, or was refused by little; then its kind is traced, and solved for every micro-batch.
Where the formula does not know the architecture, two traces of a kind propose instead (`_Probe.guess`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from brim.cost.ledger import Estimate, Moment
from brim.cost.setting import name_unknown
from brim.cost.steptime import seconds, step_time
from brim.cost.timeline import Timeline
from brim.planner.answerer import ORDER_TEXT, Answerer, answer_by_formula, budget_of, relative_cost
from brim.planner.candidates import knobs_of
from brim.probes.inputs import MakeInputs
from brim.probes.model import BuildModel
from brim.probes.rows import shares_rows
from brim.probes.solve import SOLVED_AT, Solved, extend_moment, solve
from brim.probes.stream import Traced, list_moments, read_estimate
from brim.probes.timeline import read_timeline
from brim.probes.trace import quiet, trace_step
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

_Question = tuple[Workload, Strategy]


@dataclass(slots=True)
class _Probe:
    """What was traced so far."""

    build: Callable[[Strategy], BuildModel]
    make_inputs: MakeInputs | None
    fold: bool
    lengths: tuple[int, ...]
    traces: dict[_Question, Traced] = field(default_factory=dict)
    solved: dict[_Question, Solved | None] = field(default_factory=dict)
    peaks: dict[tuple[_Question, bool], Moment] = field(default_factory=dict)
    guesses: dict[_Question, Moment] = field(default_factory=dict)

    def follow(self, workload: Workload, strategy: Strategy) -> Traced:
        """Return the stream of a strategy, traced once."""
        key = workload, strategy
        if key not in self.traces:
            build = self.build(strategy)
            self.traces[key] = trace_step(*key, build, self.make_inputs, fold=self.fold, lengths=self.lengths)
        return self.traces[key]

    def confirm(self, workload: Workload, strategy: Strategy, exactly: bool) -> bool:
        """Solve a strategy's kind for every micro-batch, then, exactly, trace the strategy itself; return whether there
        was anything left to do."""
        kind = workload, _kind(strategy)
        if _is_solvable(workload, strategy) and kind not in self.solved:
            small, large = (self.follow(workload, replace(kind[1], micro_batch_size=size)) for size in SOLVED_AT)
            self.solved[kind] = solve(small, large)
            return True
        if self.peak(workload, strategy) is not None and not exactly:
            return False
        before = len(self.traces)
        self.follow(workload, strategy)
        return len(self.traces) > before

    def peak(self, workload: Workload, strategy: Strategy) -> Moment | None:
        """Return the moment of a strategy's peak: traced, or solved; None if neither is done."""
        key = workload, strategy
        found, known = self.traces.get(key), self.solved.get((workload, _kind(strategy)))
        if found is None and (known is None or not _is_solvable(workload, strategy)):
            return None
        if (key, found is None) not in self.peaks:
            traced = found or known.trace_at(strategy.micro_batch_size)  # type: ignore[union-attr]
            moments = list_moments(traced.pieces, traced.storages)
            self.peaks[key, found is None] = max(moments, key=lambda one: one.total_bytes)
        return self.peaks[key, found is None]

    def guess(self, workload: Workload, strategy: Strategy) -> Moment:
        """Return the peak as two traces tell it, where that is enough to choose by; else that of a trace of its own.

        A single sequence lies on the line but for copies that expansion avoids. A batch without accumulation needs at
        most what an accumulated one does, at least that less the gradients, which wait nowhere: between the two, it is
        traced.
        """
        key = workload, strategy
        if shares_rows(workload, strategy) or workload.batch.sequences < max(SOLVED_AT):
            return self._measure(workload, strategy)
        if key not in self.guesses:
            self.guesses[key] = self._follow_line(workload, strategy)
        found, budget_bytes = self.guesses[key], budget_of(workload, "trace").budget_bytes
        least = found.total_bytes - (found.ledger.gradients if strategy.gradient_accumulation_steps == 1 else 0)
        return self._measure(workload, strategy) if least <= budget_bytes < found.total_bytes else found

    def _measure(self, workload: Workload, strategy: Strategy) -> Moment:
        self.follow(workload, strategy)
        found = self.peak(workload, strategy)
        assert found is not None
        return found

    def _follow_line(self, workload: Workload, strategy: Strategy) -> Moment:
        """Return the peak of a strategy, accumulated: by the storages of two traces, else by their moments."""
        kind = _kind(strategy)
        small, large = (self.follow(workload, replace(kind, micro_batch_size=size)) for size in SOLVED_AT)
        known = self.solved.setdefault((workload, kind), solve(small, large))
        if known is not None:
            return known.peak(strategy.micro_batch_size)
        ends = [{one.name: one for one in list_moments(traced.pieces, traced.storages)} for traced in (small, large)]
        sizes = strategy.micro_batch_size, *SOLVED_AT
        moments = [extend_moment(one, ends[1][name], sizes) for name, one in ends[0].items() if name in ends[1]]
        return max(moments, key=lambda one: one.total_bytes)

    def largest(self, workload: Workload, strategy: Strategy, budget_bytes: int) -> int | None:
        """Return the largest micro-batch of a strategy's kind within some bytes, if the kind was solved."""
        known = self.solved.get((workload, _kind(strategy)))
        return None if known is None else known.largest_within(budget_bytes)


def _kind(strategy: Strategy) -> Strategy:
    """All knobs but the split."""
    return replace(knobs_of(strategy), gradient_accumulation_steps=2)


def _is_solvable(workload: Workload, strategy: Strategy) -> bool:
    """Whether its stream follows from those of two and three sequences a micro-batch, accumulated.

    The mask of sequences that share a row grows with the square of the micro-batch.
    """
    accumulates = strategy.gradient_accumulation_steps > 1 and strategy.micro_batch_size >= min(SOLVED_AT)
    return accumulates and not shares_rows(workload, strategy)


def answer_by_trace(
    build: Callable[[Strategy], BuildModel], make_inputs: MakeInputs | None = None, *, fold: bool = True,
    lengths: tuple[int, ...] = (),
) -> Answerer:  # fmt: skip
    """Return the trace as an answerer.

    Args:
        build: returns what builds the model, given the strategy (its attention kernel).
        make_inputs: returns one micro-batch; by the model's signature if None.
        fold: whether alike layers are run four deep and repeated.
        lengths: tokens of a sequence, micro-batch by micro-batch; empty for the workload's length in all.
    """
    formula, probe = answer_by_formula(), _Probe(build, make_inputs, fold, lengths)

    def peak(workload: Workload, strategy: Strategy) -> int:
        found = _ask(probe, workload, strategy)
        return formula.peak(workload, strategy) if found is None else found.total_bytes

    def moment(workload: Workload, strategy: Strategy) -> str:
        found = _ask(probe, workload, strategy)
        return formula.moment(workload, strategy) if found is None else found.name

    def estimate(workload: Workload, strategy: Strategy) -> Estimate:
        with quiet():
            found = read_estimate(workload, strategy, probe.follow(workload, strategy))
        if not _is_known(workload):
            return found
        return replace(found, step_time=step_time(workload, strategy), notes=(*found.notes, "step time by formula"))

    def timeline(workload: Workload, strategy: Strategy) -> Timeline:
        traced, device = probe.follow(workload, strategy), workload.cluster.device
        return read_timeline(
            traced.events, traced.storages, expandable=strategy.allocator == "expandable_segments",
            capacity_bytes=device.plannable_bytes, budget_bytes=budget_of(workload, "trace").budget_bytes,
        )  # fmt: skip

    return Answerer(
        source="trace", estimate=estimate, peak=peak, moment=moment, timeline=timeline,
        budget=lambda workload: budget_of(workload, "trace"),
        seconds=lambda workload, strategy: seconds(workload, strategy) if _is_known(workload) else None,
        order=relative_cost, order_text=ORDER_TEXT, confirm=probe.confirm, largest=probe.largest,
        is_dear=lambda workload: not _is_known(workload),
    )  # fmt: skip


def _is_known(workload: Workload) -> bool:
    """Whether the formula has an answer."""
    return bool(workload.model.groups) and name_unknown(workload) is None


def _ask(probe: _Probe, workload: Workload, strategy: Strategy) -> Moment | None:
    """Return the peak as far as known; where the formula has no answer, it is traced now, or follows from traces."""
    found = probe.peak(workload, strategy)
    return found if found is not None or _is_known(workload) else probe.guess(workload, strategy)

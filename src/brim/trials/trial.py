"""The trial: a strategy, or the climb to the fastest that fits, run for a few real optimizer steps on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from brim.errors import ProbeFailed
from brim.planner.answerer import Answerer, budget_of
from brim.planner.candidates import Fixed
from brim.planner.plan import write_plan
from brim.planner.record import Plan
from brim.planner.search import Found, cost_strategy
from brim.planner.tried import plan_tried
from brim.spec.observation import Observation
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.trials.candidates import list_candidates
from brim.trials.climb import Climb, climb
from brim.trials.ladder import UNTRIED_SPREAD, Candidate, Ladder, Outcome
from brim.trials.observe import observe, read_estimate, read_outcome
from brim.trials.ranks import Ranks
from brim.trials.record import Point, Trial
from brim.trials.request import Request
from brim.trials.workers import LONGEST_SECONDS, Worker


@dataclass(slots=True, kw_only=True)
class Bench:
    """A job on a device, and who runs its strategies there."""

    workload: Workload
    """The job."""
    fixed: Fixed
    """Strategy fields the user fixed."""
    config: Mapping[str, Any]
    """The model's `config.json`."""
    formula: Answerer
    """Who predicts."""
    script: str | None = None
    """The user's own `train.py:make_trainer`."""
    assumptions: tuple[str, ...] = ()
    """Defaults that were filled in."""
    brim_version: str = ""
    """Version to write into records."""
    spread: float = UNTRIED_SPREAD
    """How far predictions may be off, as a fraction."""
    longest_seconds: float = LONGEST_SECONDS
    """How long a strategy may take."""
    say: Callable[[Observation], None] = lambda run: None
    """Is told of every run as it ends."""
    note: Callable[[Observation], str | None] = lambda run: None
    """Keeps every run; returns why it could not, or None."""
    runs: list[Observation] = field(default_factory=list)
    """What was run."""
    notes: dict[str, None] = field(default_factory=dict)
    """What the runs assumed."""

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on a capped CPU."""
        return self.workload.cluster.device.vendor == "cpu"

    @property
    def capacity_bytes(self) -> int:
        """What the device may hold."""
        return self.workload.cluster.device.plannable_bytes

    @property
    def budget_bytes(self) -> int:
        """Bytes that tensors may take."""
        return budget_of(self.workload, "trial").budget_bytes

    def join(self, ranks: Ranks) -> Ranks:
        """Hold the job to the device of the weakest rank, and return the ranks."""
        least = ranks.find_least("capacity", self.capacity_bytes)
        cluster = self.workload.cluster
        room = {"capacity_bytes": least} if self.on_cpu else {"free_bytes": least}
        if least < self.capacity_bytes:
            device = replace(cluster.device, **room)  # type: ignore[arg-type]
            self.workload = replace(self.workload, cluster=replace(cluster, device=device))
        return ranks

    def predict(self, strategy: Strategy) -> Plan:
        """Return the job with a strategy, as the formula costs it."""
        costed = cost_strategy(self.workload, strategy, self.formula.peak(self.workload, strategy), self.formula)
        found = Found(best=costed, fitting=(costed,), over=(), budget_bytes=self.budget_bytes)
        plan = write_plan(self.workload, self.fixed, found, self.formula, brim_version=self.brim_version)
        return replace(plan, budget_bytes=self.budget_bytes)

    def run(self, strategy: Strategy, worker: Worker, ranks: Ranks) -> Observation:
        """Run a strategy on every rank and return what it showed.

        Raises:
            ProbeFailed: it raised what is no matter of memory.
        """
        plan = self.predict(strategy)
        request = Request(
            plan=plan, config=self.config, capacity_bytes=self.capacity_bytes, on_cpu=self.on_cpu, script=self.script,
            meeting=ranks.name_meeting(),
        )  # fmt: skip
        answer = ranks.agree(worker.run(request, ranks.is_lost))
        if answer.ending == "failed":
            raise ProbeFailed(f"the trial's step does not run: {answer.problem}")
        run = observe(plan, answer, self.capacity_bytes)
        self.runs.append(run)
        self.notes |= dict.fromkeys(answer.notes)
        self.say(run)
        warning = self.note(run)
        self.notes |= {warning: None} if warning else {}
        return run


def try_strategy(bench: Bench, strategy: Strategy) -> Trial:
    """Return one strategy, run.

    Raises:
        ProbeFailed: it raised what is no matter of memory.
    """
    with Worker(bench.longest_seconds) as worker:
        ranks = bench.join(Ranks())
        run = bench.run(strategy, worker, ranks)
    best = run if run.fits else None
    return _finish(bench, best, "one strategy was asked for", Ladder(()))


def try_fastest(bench: Bench) -> Trial:
    """Return the fastest strategy that fits, found in a few runs.

    Raises:
        ProbeFailed: no strategy ran, for a reason that is no matter of memory.
    """
    failures: list[ProbeFailed] = []
    with Worker(bench.longest_seconds) as worker:
        ranks = bench.join(Ranks())
        candidates = list_candidates(bench.workload, bench.fixed, bench.formula, on_cpu=bench.on_cpu)

        def run(strategy: Strategy) -> Outcome:
            try:
                return read_outcome(bench.run(strategy, worker, ranks))
            except ProbeFailed as error:  # the other kinds may run: not every model can be checkpointed
                failures.append(error)
                return Outcome(strategy=strategy, fits=False, problem=str(error))

        found = climb(candidates, run, bench.budget_bytes, spread=bench.spread)
    if failures and not bench.runs:
        raise failures[0]
    bench.notes |= dict.fromkeys(f"left out: {error}" for error in failures)
    _mark_slower(bench, found)
    chosen = found.best.strategy if found.best is not None else None
    best = next((run for run in bench.runs if run.strategy == chosen), None)
    return _finish(bench, best, found.reason, Ladder(candidates, tried={one.strategy: one for one in found.tried}))


def _mark_slower(bench: Bench, found: Climb) -> None:
    """Runs that the climb counts as not fitting, though they ended: slower than a smaller micro-batch."""
    said = {one.strategy: one.problem for one in found.tried if not one.fits}
    bench.runs = [
        replace(run, fits=False, problem=said[run.strategy]) if run.fits and run.strategy in said else run
        for run in bench.runs
    ]


def _finish(bench: Bench, best: Observation | None, reason: str, ladder: Ladder) -> Trial:
    plan = None
    if best is not None:
        plan = plan_tried(
            bench.workload, bench.fixed, bench.runs, best, read_estimate(best, tuple(bench.notes)), bench.formula,
            assumptions=bench.assumptions, num_candidates=len(ladder.candidates), brim_version=bench.brim_version,
        )  # fmt: skip
    return Trial(
        runs=tuple(bench.runs), best=best, plan=plan, reason=reason, points=list_points(bench, ladder),
        budget_bytes=bench.budget_bytes, notes=tuple(bench.notes),
    )  # fmt: skip


def list_points(bench: Bench, ladder: Ladder) -> tuple[Point, ...]:
    """Return every candidate as memory and speed, the lightest first: as measured, else as runs of its kin say."""
    runs = {run.strategy: run for run in bench.runs}
    timed = [run for run in bench.runs if run.step_seconds is not None]
    if not timed:
        return ()
    tokens = (timed[0].tokens_per_second or 0.0) * (timed[0].step_seconds or 0.0)
    points = [_point(bench, ladder, one, runs.get(one.strategy), tokens) for one in ladder.candidates]
    return tuple(sorted((one for one in points if one is not None), key=lambda one: one.peak_bytes))


def _point(
    bench: Bench, ladder: Ladder, candidate: Candidate, run: Observation | None, tokens: float
) -> Point | None:
    if run is not None:
        if run.peak_allocated_bytes is None or run.tokens_per_second is None:
            return None
        return Point(
            strategy=run.strategy, peak_bytes=run.peak_allocated_bytes, tokens_per_second=run.tokens_per_second,
            measured=True, fits=run.fits,
        )  # fmt: skip
    peak, seconds = int(ladder.range_of(candidate).likely), ladder.seconds_of(candidate)
    return Point(
        strategy=candidate.strategy, peak_bytes=peak, tokens_per_second=tokens / seconds, measured=False,
        fits=peak <= bench.budget_bytes and not ladder.fails(candidate),
    )  # fmt: skip

"""Watching a run: what is read when, what is said of it, and the record that is left."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from brim.devices.meter import Meter
from brim.errors import InvalidFile
from brim.planner.record import Plan
from brim.runtime.forecast import Forecast
from brim.runtime.gauge import Gauge
from brim.runtime.judge import OF_A_SPLIT, OUT_OF_ROOM, judge
from brim.runtime.observed import build_record, find_allocator_variable, is_expandable
from brim.runtime.pace import Mark, Pace
from brim.runtime.ranks import gather_numbers
from brim.runtime.run_record import write_run
from brim.runtime.sight import Sight, Verdict, describe_progress
from brim.runtime.survival import Ask, Survival, describe_survival, follow
from brim.runtime.worst import UNKNOWN, Numbers, Worst, find_worst
from brim.spec.observation import Observation
from brim.spec.strategy import Strategy

T = TypeVar("T")
Note = Callable[[Observation], Any]
"""Takes a run when it is over; a text that it returns is said as a warning."""

_FIRST_STEPS, _EVERY = (2, 3, 5, 10, 20, 30, 40), 50
_SETTLED = 3
"""Step from which on nothing is new: the optimizer has its states, gradients were accumulated beside them."""
_LEAST_SECONDS = 1.0
"""A shorter stretch says little of speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is watched."""

    plan: Plan | None = None
    """What had been planned; None compares with nothing."""
    strategy: Strategy
    """How it is run."""
    coming_tokens: int | None = None
    """Longest sequence still to come; None if unknown."""
    last_step: int | None = None
    """Optimizer steps that the run will make, where that is known."""
    folder: str | None = None
    """Where `brim-run.json` goes; None writes none."""
    is_first: bool = True
    """Whether this is the rank that speaks and writes."""
    device: Any = "cpu"
    """Where the tensors of a collective live."""
    group: Any = None
    """Process group of the ranks; the default one if None."""
    survival: Ask = Survival
    """Tells how the run goes on after an out-of-memory that was survived, alike on every rank; asked each step."""


def say(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)


class Watcher:
    """Watches one run. A trainer's callback and the plain loop both call it; nothing it does stops the run.

    At steps 2, 3, 5, 10, 20, 30, 40 and then each 50th the counters of the device are read and ranks tell each other,
    by one small collective right after an optimizer step, which every rank makes as often. In between only shapes and
    the clock are looked at.
    """

    def __init__(
        self, task: Task, meter: Meter | None, *, note: Note | None = None, tell: Callable[[str], None] = say,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        """Begin to watch: peaks begin again from what is held now.

        Args:
            task: what is watched.
            meter: counters of the device; None where nothing counts.
            note: given the observation when the run is over.
            tell: given each line that is said.
            clock: gives seconds.
        """
        self.task, self.verdicts, self.step = task, list[Verdict](), 0
        self.name = meter.name if meter is not None else "cpu"
        self.gauge, self.pace = Gauge(meter), Pace(clock)
        self.strategy, self._survival = task.strategy, Survival()
        self._said: set[str] = set()
        self._forecast = Forecast(task.plan, task.strategy, self.name) if task.plan is not None else None
        self._tell, self._note = tell, note
        self._is_broken = self._is_unwritable = self._has_told = False
        self._worst = Worst(Numbers(), 0, 1)
        self._settled: tuple[int, Numbers] | None = None
        self._logged = self._stretch = Mark()
        self._token_seconds: list[float] = []
        self.sight = Sight(step=0)

    def add(self, inputs: Any) -> None:
        """Count a micro-batch."""
        self._safely(self.pace.add, inputs)

    def begin_step(self) -> None:
        """Let time run."""
        self.pace.begin_step()

    def pause(self) -> None:
        """Leave out the time until the next step begins."""
        self.pace.pause()

    def look(self) -> None:
        """Read the counters, since something else than training comes next, which may hide the peak."""
        self._safely(self.gauge.look)

    def set_aside(self) -> None:
        """Take note that the loop did something else than train: evaluate, save."""
        self._safely(self.gauge.look_aside)
        self.pace.pause()

    def end_step(self, *, looks: bool = False) -> None:
        """Count an optimizer step, and look closer if it is one of those. A collective then: every rank calls it.

        Args:
            looks: read the counters in any case: something else comes next that may hide the peak.
        """
        self.step += 1
        changed = self._safely(self._follow_survival)
        if not changed:
            self._safely(self.pace.end_step)
        if self.step == 1 and not changed:
            self._safely(self._leave_first)
        if self.step in _FIRST_STEPS or self.step % _EVERY == 0 or self.step == self.task.last_step:
            mine = self._safely(self._collect) or Numbers()
            self._safely(self._judge, gather_numbers(mine, self.task.device, self.task.group))
        elif looks:
            self.look()

    def find(self, verdict: Verdict | None) -> None:
        """Say a verdict, unless one of its code was said; only the first rank does."""
        if verdict is not None and verdict.code not in self._said:
            self._said.add(verdict.code)
            self._say(verdict)

    def _say(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        if self.task.is_first:
            self._tell(f"brim: {verdict.severity}: {verdict.text}")

    def read_log(self) -> dict[str, float]:
        """Return this rank's numbers for a logger, by key; speeds are those since the last call."""
        return self._safely(self._read_log) or {}

    def finish(self, problem: str = "") -> Observation | None:
        """Return the record of the run, write it down and hand it on; None without a plan or a step.

        Args:
            problem: why the run died; empty if it did not.
        """
        if not self.step:
            return None
        return self._safely(self._finish, problem)

    def _follow_survival(self) -> bool:
        """Return whether the step that ends now was survived; what is measured from here on is another way of running.

        The first rank says what was survived; peaks, counters and speeds begin again, and the estimate is asked anew.
        """
        now, before = self.task.survival(), self._survival
        if now == before:
            return False
        self._survival, ran = now, self.strategy
        self.strategy = follow(self.task.strategy, now)
        if self._forecast is not None:
            self._forecast.strategy = self.strategy
        if now.num_events == before.num_events and (self.strategy == ran or self.step == 1):
            return False  # the split that the run began with
        self.pace.drop_step()
        self.pace.forget_shapes()
        self.gauge.begin_again()
        self._worst, self._settled = Worst(Numbers(), 0, 1), None
        self._said -= set(OF_A_SPLIT)
        self._stretch, self._token_seconds = self.pace.read(), []
        if now.num_events > before.num_events:
            self._say(describe_survival(self.step, now, self.strategy))
        return True

    def _leave_first(self) -> None:
        """Read what the first step took; unless it is the only one, peaks begin again."""
        self.gauge.look()
        if self.task.last_step != 1:
            self.gauge.restart()

    def _collect(self, *, whole: bool = True) -> Numbers:
        """Return this rank's numbers; the peak of a step that did not end, `whole` False, is no step's."""
        gauge, pace = self.gauge, self.pace
        has_meter = (gauge.look() if whole else gauge.look_aside()) is not None
        total = pace.read()
        self._end_stretch(total)
        seconds = total.seconds / total.steps if total.steps else pace.first_seconds
        known = total.steps and total.run_tokens
        return Numbers(
            allocated_bytes=gauge.allocated_bytes if has_meter else UNKNOWN,
            trained_bytes=gauge.trained_bytes or UNKNOWN, reserved_bytes=gauge.reserved_bytes if has_meter else UNKNOWN,
            device_bytes=gauge.device_bytes if has_meter else UNKNOWN, num_retries=gauge.num_retries,
            num_ooms=gauge.num_ooms, longest_tokens=self._as_planned(pace) or UNKNOWN, step_seconds=seconds or UNKNOWN,
            run_tokens=total.run_tokens / total.steps if known else UNKNOWN,
            real_tokens=total.real_tokens / total.steps if known else UNKNOWN,
            first_token_seconds=self._token_seconds[0] if self._token_seconds else UNKNOWN,
            token_seconds=min(self._token_seconds[-2:]) if len(self._token_seconds) > 2 else UNKNOWN,
            capacity_bytes=gauge.capacity_bytes or UNKNOWN,
        )  # fmt: skip

    def _as_planned(self, pace: Pace) -> int:
        """Return the longest sequence so far; without padding a micro-batch is one row, and its mean counts."""
        strategy = self.task.strategy
        return -(-pace.most_tokens // strategy.micro_batch_size) if strategy.padding_free else pace.longest_tokens

    def _end_stretch(self, total: Mark) -> None:
        done = total.since(self._stretch)
        if done.seconds < _LEAST_SECONDS or not done.run_tokens:
            return
        self._stretch = total
        self._token_seconds = [*self._token_seconds[:1], *self._token_seconds[1:][-1:], done.seconds / done.run_tokens]

    def _judge(self, rows: Sequence[Sequence[float]]) -> None:
        self._worst = find_worst(rows)
        if self._settled is None and self.step >= _SETTLED:
            self._settled = (self.step, self._worst.numbers)
        if not self.task.is_first:
            return
        self.sight = self._see()
        num_said = len(self.verdicts)
        for verdict in judge(self.sight):
            self.find(verdict)
        is_settled = self.step >= _SETTLED or self.step == self.task.last_step
        if is_settled and not self._has_told:
            self._has_told = True
            self._tell(f"brim: {describe_progress(self.sight)}")
            self._write(state="running")
        elif len(self.verdicts) > num_said:
            self._write(state="running")

    def _see(self) -> Sight:
        """Return the worst rank's numbers beside the plan's."""
        now, plan, task = self._worst.numbers, self.task.plan, self.task
        step, first = self._settled if self._settled is not None else (0, Numbers())
        seen, coming = _whole(now.longest_tokens), task.coming_tokens
        if self._forecast is not None and seen is not None and coming is None and plan is not None:
            coming = plan.workload.data.seq_len
        coming = max(coming, seen) if coming is not None and seen is not None else coming
        real, run, seconds = now.real_tokens, now.run_tokens, now.step_seconds
        sight = Sight(
            step=self.step, micro_batch_size=self.strategy.micro_batch_size,
            gradient_accumulation_steps=self.strategy.gradient_accumulation_steps,
            capacity_bytes=_whole(now.capacity_bytes), budget_bytes=plan.budget_bytes if plan is not None else None,
            peak_allocated_bytes=_whole(now.trained_bytes),
            aside_bytes=_whole(now.allocated_bytes) if now.allocated_bytes > now.trained_bytes else None,
            peak_reserved_bytes=_whole(now.reserved_bytes),
            rank=self._worst.rank, first_step=step, first_allocated_bytes=_whole(first.allocated_bytes),
            first_reserved_bytes=_whole(first.reserved_bytes), num_retries=int(now.num_retries),
            num_ooms=int(now.num_ooms), seen_tokens=seen, coming_tokens=coming, seen_estimate_bytes=self._ask(seen),
            coming_estimate_bytes=self._ask(coming), seen_scores_bytes=self._ask_scores(seen),
            coming_scores_bytes=self._ask_scores(coming), step_seconds=seconds if seconds > 0 else None,
            estimate_seconds=self._find_seconds(run), first_token_seconds=_known(now.first_token_seconds),
            token_seconds=_known(now.token_seconds),
            tokens_per_second=real / seconds if min(real, seconds) > 0 else None,
            padding_fraction=1 - real / run if run > 0 and real >= 0 else None, expandable=is_expandable(),
            allocator_variable=find_allocator_variable(),
        )  # fmt: skip
        return self._fit(sight)

    def _ask(self, num_tokens: int | None) -> int | None:
        return self._forecast.peak(num_tokens) if self._forecast is not None and num_tokens else None

    def _ask_scores(self, num_tokens: int | None) -> int:
        return self._forecast.scores(num_tokens) if self._forecast is not None and num_tokens else 0

    def _find_seconds(self, run_tokens: float) -> float | None:
        """Return the predicted time of a step of so many tokens on this rank: in proportion to those planned."""
        plan = self.task.plan
        if plan is None or plan.estimate.step_time is None or run_tokens <= 0:
            return None
        split = plan.strategy
        planned = split.micro_batch_size * split.gradient_accumulation_steps * plan.workload.data.seq_len
        return plan.estimate.step_time.step_seconds * run_tokens / planned

    def _fit(self, sight: Sight) -> Sight:
        """Return the same with what would fit, where anything is wrong with memory."""
        budget, seen, coming = sight.budget_bytes, sight.seen_tokens, sight.coming_tokens
        if self._forecast is None or budget is None or sight.ratio is None or coming is None or seen is None:
            return sight
        over = max(sight.coming_peak_bytes or 0, sight.peak_allocated_bytes or 0) > budget
        if not (over or sight.num_retries or sight.num_ooms):
            return sight
        return replace(sight, fitting=self._forecast.find_fitting(sight.correct, budget, seen, coming))

    def _read_log(self) -> dict[str, float]:
        reading, total = self.gauge.look(), self.pace.read()
        found: dict[str, float] = {}
        if reading is not None:
            found = {
                "memory/allocated_bytes": reading.allocated_bytes, "memory/reserved_bytes": reading.reserved_bytes,
                "memory/peak_allocated_bytes": self.gauge.allocated_bytes,
                "memory/peak_reserved_bytes": self.gauge.reserved_bytes, "memory/device_bytes": reading.device_bytes,
            }  # fmt: skip
        done, self._logged = total.since(self._logged), total
        if done.steps and done.seconds > 0:
            found["speed/step_seconds"] = done.seconds / done.steps
            if done.run_tokens:
                found["speed/tokens_per_second"] = done.real_tokens / done.seconds
                found["speed/padding_fraction"] = 1 - done.real_tokens / done.run_tokens
        return found

    def _finish(self, problem: str) -> Observation | None:
        """Close the books: this rank's last numbers beside the last that ranks have told each other."""
        last = find_worst([self._worst.numbers, self._collect(whole=not problem)])
        self._worst = self._worst._replace(numbers=last.numbers)
        self.sight = self._see()
        if not self.task.is_first:
            return None
        for verdict in judge(self.sight):
            if not problem or verdict.code in OUT_OF_ROOM:
                self.find(verdict)
        record = self._write(state="died" if problem else "ended", problem=problem)
        if record.observation is not None:
            self._safely(self._hand_on, record.observation)
        return record.observation

    def _hand_on(self, observation: Observation) -> None:
        said = self._note(observation) if self._note is not None else None
        if isinstance(said, str):
            self._tell(f"brim: warning: {said}")

    def _write(self, *, state: Any, problem: str = "") -> Any:
        record = build_record(
            self.task, self.strategy, self._worst, self.sight, tuple(self.verdicts), name=self.name, state=state,
            problem=problem,
        )  # fmt: skip
        if self.task.folder is None or self._is_unwritable:
            return record
        try:
            write_run(self.task.folder, record)
        except InvalidFile as error:
            self._is_unwritable = True
            self._tell(f"brim: warning: the run goes on without its record: {error}")
        return record

    def _safely(self, act: Callable[..., T], *given: Any) -> T | None:
        """Return what `act` does; what goes wrong in watching is said once and never reaches the run."""
        try:
            return act(*given)
        except Exception as error:
            if not self._is_broken and self.task.is_first:
                what = (str(error).splitlines() or [""])[0][:200]
                self._tell(f"brim: warning: the run goes on, watching it failed: {type(error).__name__}: {what}")
            self._is_broken = True
            return None


def _known(number: float) -> float | None:
    return number if number > 0 and math.isfinite(number) else None


def _whole(number: float) -> int | None:
    return round(number) if number > 0 else None

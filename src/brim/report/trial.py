"""A trial on the terminal and as a page: what was run, what it showed beside what was predicted, what was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from brim.report.commands import Commands
from brim.report.html import format_page, format_row, format_table
from brim.report.memory import make_table
from brim.report.numbers import format_difference, format_rounded, format_seconds
from brim.report.pareto import Scatter, draw_pareto
from brim.report.plan import format_list, format_run, format_section
from brim.report.words import describe_batch, describe_knobs, describe_strategy, describe_workload, list_varied
from brim.spec.observation import Observation
from brim.trials.record import Trial
from brim.units import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

_HEADS = ("strategy", "tensors", "predicted", "reserved", "step", "tokens/s", "verdict")
_NUMBERS = ("tensors", "predicted", "reserved", "step", "tokens/s")


def describe_run(run: Observation) -> str:
    """Return one run as a line."""
    knobs = describe_knobs(run.strategy)
    split = f"{run.strategy.micro_batch_size} x {run.strategy.gradient_accumulation_steps}"
    if run.peak_allocated_bytes is None:
        return f"ran {split}, {knobs}: {run.problem}"
    speed = f", {format_rounded(run.tokens_per_second)} tokens/s" if run.tokens_per_second else ""
    problem = f"; {run.problem}" if run.problem else ""
    return f"ran {split}, {knobs}: {format_size(run.peak_allocated_bytes)}{speed}{problem}"


def format_trial(trial: Trial, *, next_commands: Sequence[str] = ()) -> Group:
    """Return a trial as text: the verdict first, then the runs, then memory against speed.

    Args:
        trial: what was found.
        next_commands: what to type next, one command each.
    """
    style = "bold green" if trial.best is not None else "bold red"
    chosen = trial.best.strategy if trial.best is not None else None
    searched = len(trial.runs) > 1 or len(trial.points) > 1
    curve = Scatter(trial.points, chosen, trial.budget_bytes) if searched and trial.points else None
    parts: list[RenderableType] = [
        Text(format_trial_verdict(trial), style=style), Text(""), _format_head(trial),
        *format_section("Runs", _format_runs(trial)),
        *format_section("Time of a step", format_list(list_times(trial))),
        *format_section("Memory against speed", curve),
        *format_section("Best at each size", _format_frontier(trial) if searched else None),
        *format_section("Assumed", format_run(_list_assumed(trial))),
        *format_section("Next", Commands(next_commands) if next_commands else None),
    ]  # fmt: skip
    return Group(*parts)


def format_trial_verdict(trial: Trial) -> str:
    """Return the first line: whether it fits, as what, and how fast."""
    if trial.best is None:
        return f"Does not fit: {_describe_smallest(trial.runs)}"
    speed = f", {format_rounded(trial.best.tokens_per_second)} tokens/s" if trial.best.tokens_per_second else ""
    batch = describe_batch(trial.plan) if trial.plan is not None else ""
    return f"Fits, measured: {batch}{speed}"


def _describe_smallest(runs: Sequence[Observation]) -> str:
    run = min(runs, key=lambda one: one.strategy.micro_batch_size)
    split = f"micro-batch {run.strategy.micro_batch_size} x accumulation {run.strategy.gradient_accumulation_steps}"
    checkpointing = run.strategy.activation_checkpointing.replace("none", "no")
    return f"{split} with {checkpointing} checkpointing on {run.device}: {run.problem}"


def _format_head(trial: Trial) -> Text:
    if not trial.runs:
        return Text("")
    first = trial.runs[0]
    ranks = f" on each of {first.num_ranks} ranks, the weakest counts" if first.num_ranks > 1 else ""
    device = f"{first.device}, {format_size(first.capacity_bytes)}{ranks}"
    ooms = f", {trial.num_ooms} out of memory" if trial.num_ooms else ""
    lines = [
        describe_workload(first.workload),
        f"on {device}; {len(trial.runs)} run{'s' if len(trial.runs) != 1 else ''}{ooms}; ended because "
        f"{trial.reason}",
    ]  # fmt: skip
    return Text("\n".join(lines))


def _format_runs(trial: Trial) -> Table:
    table = make_table(*_HEADS, right=_NUMBERS, whole=("strategy",))
    for run, cells in list_rows(trial):
        table.add_row(*cells, style="bold" if run is trial.best else None)
    return table


def list_rows(trial: Trial) -> Iterator[tuple[Observation, list[str]]]:
    """Yield every run with the cells of its row."""
    knobs = list_varied([run.strategy for run in trial.runs]) or ("activation_checkpointing",)
    for run in trial.runs:
        yield run, [describe_strategy(run.strategy, knobs), *_list_figures(run), _find_verdict(run, trial)]


def _list_figures(run: Observation) -> list[str]:
    said = run.predicted.peak_allocated_bytes if run.predicted is not None else 0
    peak = run.peak_allocated_bytes
    predicted = format_size(said) if said else "-"
    if peak is not None and said:
        predicted += f" ({format_difference(said, peak)})"
    return [
        "-" if peak is None else format_size(peak), predicted,
        "-" if run.peak_reserved_bytes is None else format_size(run.peak_reserved_bytes),
        "-" if run.step_seconds is None else format_seconds(run.step_seconds),
        "-" if run.tokens_per_second is None else format_rounded(run.tokens_per_second),
    ]  # fmt: skip


def _find_verdict(run: Observation, trial: Trial) -> str:
    if run is trial.best:
        return "chosen" if len(trial.runs) > 1 else "fits"
    return run.problem or "fits"


def list_times(trial: Trial) -> list[str]:
    """Return how the time of the chosen step is made up, one sentence each."""
    run = trial.best
    if run is None or run.step_seconds is None:
        return []
    steps = run.strategy.gradient_accumulation_steps
    if run.fixed_seconds is None or run.micro_batch_seconds is None:
        return [f"{format_seconds(run.step_seconds)}; fixed cost and cost of a micro-batch could not be told apart"]
    step, fixed, micro = map(format_seconds, (run.step_seconds, run.fixed_seconds, run.micro_batch_seconds))
    return [
        f"{step} = {fixed} fixed (optimizer, clipping) + {steps} x {micro} per micro-batch (forward and backward), "
        "from steps of two lengths"
    ]


def _format_frontier(trial: Trial) -> Table | None:
    frontier = trial.frontier
    if not frontier:
        return None
    knobs = list_varied([point.strategy for point in frontier])
    table = make_table("strategy", "tensors", "tokens/s", "source", right=("tensors", "tokens/s"), whole=("strategy",))
    chosen = trial.best.strategy if trial.best is not None else None
    for point in frontier:
        source = "measured" if point.measured else "expected from the runs"
        table.add_row(
            describe_strategy(point.strategy, knobs), format_size(point.peak_bytes),
            format_rounded(point.tokens_per_second), source, style="bold" if point.strategy == chosen else None,
        )  # fmt: skip
    return table


def _list_assumed(trial: Trial) -> tuple[str, ...]:
    weights = "weights random, every sequence as long as planned; forward, backward and optimizer are real"
    return (weights, *(trial.plan.assumptions if trial.plan is not None else ()), *trial.notes)


def trial_page(trial: Trial) -> str:
    """Return a self-contained page: memory against speed, and every run. No script, nothing fetched."""
    title = f"Trial of {trial.runs[0].workload.model.name}" if trial.runs else "Trial"
    chosen = trial.best.strategy if trial.best is not None else None
    rows = [
        _format_row([escape(cell) for cell in cells], "chosen" if run is trial.best else "")
        for run, cells in list_rows(trial)
    ]
    state = "fits" if trial.best is not None else "misfit"
    parts = [
        f"<h2>{escape(title)}</h2>",
        f'<div class="{state}"><p>{escape(format_trial_verdict(trial))}</p>'
        f'<p class="dim">{escape(str(_format_head(trial)))}</p></div>',
        "<h4>Memory against speed</h4>", draw_pareto(trial.points, chosen, trial.budget_bytes),
        '<p class="dim">Filled: measured. Open: expected from the runs. The line: no other strategy is better in '
        "both.</p>",
        "<h4>Runs</h4>", format_table(_HEADS[:1], _NUMBERS, rows, _HEADS[-1:]),
        *(f"<p>{escape(line)}</p>" for line in list_times(trial)),
        f'<p class="dim">{escape("; ".join(_list_assumed(trial)))}</p>',
    ]  # fmt: skip
    return format_page(title, parts)


def _format_row(cells: Sequence[str], style: str) -> str:
    return format_row(cells[:1], cells[1:-1], cells[-1:], style=style)

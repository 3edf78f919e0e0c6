"""A plan on the terminal: the verdict first, then why, then everything it rests on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from brim.cost.calibration import find_accuracy
from brim.cost.correction import Calibration
from brim.cost.ledger import Estimate
from brim.planner.calibrated import describe_calibrated_speed
from brim.planner.paging import paged_bytes
from brim.planner.record import Plan, Rejected
from brim.report.commands import Commands
from brim.report.memory import PAGED_WORDS, Bar, format_ledger, make_grid, make_table
from brim.report.numbers import format_count, format_gib, format_rounded, format_seconds, format_share
from brim.report.words import describe_batch, describe_knobs, describe_strategy, describe_workload, list_varied
from brim.units import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

_NUM_ALTERNATIVES = 8


def format_plan(plan: Plan, *, next_commands: Sequence[str] = ()) -> Group:
    """Return the plan as text for a terminal or a pipe.

    Args:
        plan: the plan.
        next_commands: what to type next, one command each; shown last.
    """
    moment = f" ({plan.estimate.peak_moment})" if plan.estimate.moments else ""
    shown = plan.rejected[:_NUM_ALTERNATIVES]
    parts = [
        Text(format_verdict(plan), style="bold green" if is_fitting(plan) else "bold red"),
        Text(""),
        format_figures(plan),
        *format_section("Why", format_list(plan.reasons)),
        *format_section(f"Memory at the peak{moment}", _format_memory(plan)),
        *format_section(_title_alternatives(plan, len(shown)), format_alternatives(plan, shown) if shown else None),
        *format_section("Assumed", format_run((*plan.assumptions, *plan.estimate.notes))),
        *format_section("Warnings", format_list([warning.text for warning in plan.warnings]), style="bold yellow"),
        *format_section("Schedule", format_list(list_schedule(plan))),
        *format_section("Next", Commands(next_commands) if next_commands else None),
    ]
    return Group(*parts)


def _format_memory(plan: Plan) -> Table:
    return format_ledger(plan.estimate, plan.capacity_bytes, paged_bytes(plan.workload, plan.estimate))


def format_section(title: str, body: RenderableType | None, style: str = "bold") -> list[RenderableType]:
    """Return a blank line, the title and the indented body; nothing without a body."""
    return [] if body is None else [Text("\n" + title, style=style), Padding(body, (0, 0, 0, 2))]


def format_list(lines: Iterable[str]) -> Table | None:
    """Return a bullet list whose long lines hang; None if there are none."""
    grid = make_grid(2, gap=1)
    for line in lines:
        grid.add_row("-", Text(line))
    return grid if grid.row_count else None


def format_run(lines: Iterable[str]) -> Text | None:
    """Return short statements as one run of text; None if there are none."""
    text = "; ".join(lines)
    return Text(text) if text else None


def is_fitting(plan: Plan) -> bool:
    """Return whether the plan's peak is within its budget: the planner's own criterion."""
    return plan.estimate.peak_allocated_bytes <= plan.budget_bytes


def format_verdict(plan: Plan) -> str:
    """Return the first line: whether it fits, and how the batch is made."""
    return f"{'Fits' if is_fitting(plan) else 'Does not fit'}: {describe_batch(plan)}"


def describe_margin(estimate: Estimate) -> str:
    """Return who answered, and how wrong that answerer has been on published runs of one device."""
    if estimate.calibration is not None:
        return _describe_calibrated(estimate, estimate.calibration)
    allocated, device = (find_accuracy(estimate.source, meter) for meter in ("allocated", "device"))
    if estimate.source == "trial":
        return "trial: measured in real optimizer steps on this device"
    if allocated is None:
        return f"{estimate.source}; its error has not been measured"
    if not estimate.margin_bytes:
        median, p90 = allocated.median_error_fraction, allocated.p90_error_fraction
        return (
            f"{estimate.source}; on published runs its allocated peak was wrong by {format_share(median, 1)} at the "
            f"median, and by up to {format_share(p90, 1)} in 9 of 10"
        )
    too_low = format_size(estimate.margin_bytes)
    words = f"{estimate.source}; on published runs its allocated peak was at most {too_low} too low in 9 of 10"
    if device is None:
        return words
    return f"{words}; nvidia-smi figure: median error {format_share(device.median_error_fraction, 1)}"


def _describe_calibrated(estimate: Estimate, calibration: Calibration) -> str:
    known = calibration.allocated
    return (
        f"{estimate.source}, calibrated on {known.num_runs} measured runs of {calibration.device}; held-out error of "
        f"its allocated peak: median {known.median_error_fraction:.1%}, worst {known.worst_error_fraction:.1%}; "
        f"margin {format_size(estimate.margin_bytes)}"
    )


def describe_speed_source(estimate: Estimate) -> str:
    """Return who says the step time, and how much that is worth on this card."""
    if estimate.calibration is not None and estimate.calibration.seconds is not None:
        return describe_calibrated_speed(estimate.calibration.seconds)
    return "trial: measured" if estimate.source == "trial" else f"{estimate.source} (unmeasured on this card)"


def format_figures(plan: Plan) -> Table:
    """Return job, strategy, memory and speed, one block each."""
    grid = make_grid(2)
    grid.add_row("job", Text(describe_workload(plan.workload)))
    grid.add_row("strategy", Text(describe_knobs(plan.strategy)))
    grid.add_row("memory", _draw_memory(plan))
    for line in (_describe_limit(plan), *list_paged(plan), describe_margin(plan.estimate)):
        grid.add_row("", Text(line, style="dim"))
    grid.add_row("speed", Text(describe_speed(plan)))
    if plan.estimate.step_time is not None:
        grid.add_row("", Text(describe_speed_source(plan.estimate), style="dim"))
    return grid


def _draw_memory(plan: Plan) -> Table:
    estimate, capacity_bytes = plan.estimate, plan.capacity_bytes
    used_bytes = estimate.device_bytes - paged_bytes(plan.workload, estimate)
    parts = (estimate.peak_allocated_bytes, used_bytes - estimate.peak_allocated_bytes)
    grid = make_grid(2, gap=1)
    words = f"{format_gib(used_bytes)} of {format_size(capacity_bytes)} ({format_share(used_bytes, capacity_bytes)})"
    grid.add_row(Bar(parts, capacity_bytes, mark=plan.budget_bytes), Text(words, style="bold"))
    return grid


def list_paged(plan: Plan) -> list[str]:
    """Return one line on paged states, which are not part of the figure; none without them."""
    size_bytes = paged_bytes(plan.workload, plan.estimate)
    return [f"beside it {format_size(size_bytes)} of {PAGED_WORDS}"] if size_bytes else []


def _describe_limit(plan: Plan) -> str:
    estimate, device = plan.estimate, plan.workload.cluster.device
    where = f" at {estimate.peak_moment}" if estimate.moments else ""
    peak, limit = format_size(estimate.peak_allocated_bytes), format_size(plan.budget_bytes)
    words = f"tensors: {peak}{where}, at most {limit} (the mark)"
    free = f"; only what is free now counts, of {format_size(device.capacity_bytes)}"
    return words + (free if device.free_bytes is not None else "")


def describe_speed(plan: Plan) -> str:
    """Return seconds per step, tokens per second and the time of an epoch, as far as known."""
    time = plan.estimate.step_time
    if time is None:
        model, device = plan.workload.model, plan.workload.cluster.device
        if plan.estimate.source == "trace" and not model.groups:
            return f"not predicted: the formula says it, and does not know model_type {model.model_type}"
        return f"not predicted: {plan.estimate.source} knows no rates of {device.name}"
    num_devices = plan.workload.cluster.num_devices
    tokens = time.tokens_per_second_per_device
    words = [f"{format_seconds(time.step_seconds)} per step of {format_count(plan.effective_batch_tokens)} tokens"]
    words.append(f"{format_rounded(tokens)} tokens/s")
    if num_devices > 1:
        words[-1] += f" per GPU ({format_rounded(tokens * num_devices)} in all)"
    if plan.schedule.epoch_seconds is not None:
        words.append(f"{format_seconds(plan.schedule.epoch_seconds)} per epoch")
    return ", ".join(words)


def _title_alternatives(plan: Plan, num_shown: int) -> str:
    others = plan.num_candidates - 1
    return f"Alternatives ({num_shown} of {format_count(others)})" if others > num_shown else "Alternatives"


def format_alternatives(plan: Plan, shown: Sequence[Rejected]) -> Table:
    """Return the chosen strategy and others beside it: what each needs, how fast it is, why it was not chosen."""
    knobs = list_varied([plan.strategy, *(row.strategy for row in shown)])
    table = make_table(
        "strategy", "peak GiB", "step time", "why not", right=("peak GiB", "step time"), whole=("strategy",)
    )
    chosen = format_gib(plan.estimate.peak_allocated_bytes)
    table.add_row(describe_strategy(plan.strategy, knobs), chosen, "1.00x", "chosen", style="bold")
    for row in shown:
        table.add_row(describe_strategy(row.strategy, knobs), *_format_rejected(row))
    return table


def _format_rejected(row: Rejected) -> tuple[str, str, Text]:
    time = "-" if row.relative_step_time is None else f"{row.relative_step_time:.2f}x"
    return format_gib(row.peak_allocated_bytes), time, Text(row.reason)


def list_schedule(plan: Plan) -> list[str]:
    """Return the run in optimizer steps, one sentence each, as far as known."""
    schedule = plan.schedule
    words = f"{format_count(schedule.sequences_per_step)} sequences, {format_count(schedule.tokens_per_step)} tokens"
    lines = [f"{words} per optimizer step"]
    if schedule.steps_per_epoch is not None and schedule.num_sequences is not None:
        lines.append(
            f"{format_count(schedule.num_sequences)} sequences = {format_count(schedule.steps_per_epoch)} "
            "optimizer steps per epoch"
        )
    if schedule.total_steps is not None:
        warmup = f", {format_count(schedule.warmup_steps)} of them warmup" if schedule.warmup_steps is not None else ""
        epochs = f"{plan.workload.num_epochs:g} epoch{'s' if plan.workload.num_epochs != 1 else ''}"
        lines.append(f"{format_count(schedule.total_steps)} optimizer steps in {epochs}{warmup}")
    return [*lines, schedule.note] if schedule.note else lines

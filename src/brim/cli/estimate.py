"""`brim estimate`: what one way of running costs, answer beside answer."""

from __future__ import annotations

from typing import Any

import typer

from brim.cli.options import AS_JSON, read_whole_numbers, takes_job
from brim.cli.output import print_json, print_remark, print_report

_LENGTHS = typer.Option(
    None, "--lengths", metavar="N,N,...", help="By trace: tokens of a sequence, micro-batch by micro-batch."
)
_TIMELINE = typer.Option(None, "--timeline", metavar="FILE", help="Draw memory over the step as HTML (by trace).")
_COUNTERS = typer.Option(None, "--trace-json", metavar="FILE", help="Write counters that Perfetto opens (by trace).")
_FOLD = typer.Option(True, "--fold/--no-fold", help="By trace: run alike layers four deep and repeat them, or run all.")


@takes_job
def run_estimate(
    model: str,
    job: dict[str, Any],
    lengths: str | None = _LENGTHS,
    timeline: str | None = _TIMELINE,
    trace_json: str | None = _COUNTERS,
    fold: bool = _FOLD,
    as_json: bool = AS_JSON,
) -> None:
    """Cost one strategy, row by row and moment by moment.

    Nothing is chosen. What you do not say is as the trainer has it: micro-batch 1, no accumulation, its own
    checkpointing.

    \b
    Examples:
      brim estimate 7B --method qlora --gpu 24GiB --micro-batch-size 4 --gradient-accumulation-steps 8
      brim estimate 7B --method qlora --gpu 24GiB --micro-batch-size 4 --by rule,formula,trace
      brim estimate 7B --by trace --timeline step.html --trace-json step.json
    """
    from brim import api

    asks_trace = timeline or trace_json or lengths
    estimates = api.estimate(
        model, by=[name.strip() for name in job.pop("by", "trace" if asks_trace else "formula").split(",")], fold=fold,
        lengths=read_whole_numbers("lengths", lengths), timeline=timeline, trace_json=trace_json, **job,
    )  # fmt: skip
    for path in filter(None, (timeline, trace_json)):
        print_remark(f"wrote {path}")
    if as_json:
        print_json(api.describe_estimates(estimates))
        return
    from brim.report.estimates import format_estimates

    split = f"micro-batch {job.get('micro_batch_size', 1)}"
    if "gradient_accumulation_steps" in job:
        split += f" x accumulation {job['gradient_accumulation_steps']}"
    print_report(format_estimates(estimates, title=f"{model}, {split}"))

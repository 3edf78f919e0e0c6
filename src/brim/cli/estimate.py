"""`brim estimate`: what one way of running costs, answer beside answer."""

from __future__ import annotations

from typing import Any

from brim.cli.options import AS_JSON, takes_job
from brim.cli.output import print_json, print_report


@takes_job
def run_estimate(model: str, job: dict[str, Any], as_json: bool = AS_JSON) -> None:
    """Cost one strategy, row by row and moment by moment.

    Nothing is chosen. What you do not say is as the trainer has it: micro-batch 1, no accumulation, its own
    checkpointing.

    \b
    Examples:
      brim estimate 7B --method qlora --gpu 24GiB --micro-batch-size 4 --gradient-accumulation-steps 8
      brim estimate 7B --method qlora --gpu 24GiB --micro-batch-size 4 --by rule,formula
    """
    from brim import api

    by = job.pop("by", "formula").split(",")
    estimates = api.estimate(model, by=[name.strip() for name in by], **job)
    if as_json:
        print_json(api.describe_estimates(estimates))
        return
    from brim.report.estimates import format_estimates

    split = f"micro-batch {job.get('micro_batch_size', 1)}"
    if "gradient_accumulation_steps" in job:
        split += f" x accumulation {job['gradient_accumulation_steps']}"
    print_report(format_estimates(estimates, title=f"{model}, {split}"))

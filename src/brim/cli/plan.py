"""`brim plan`: from a model's name to a configuration that fits."""

from __future__ import annotations

from typing import Any

import typer

from brim.cli.aim import aim_at
from brim.cli.options import AS_JSON, takes_job
from brim.cli.results import EXPORT_DIR, FOR_VERSION, print_plan, suggest_export, write_results

_OUT = typer.Option(None, "--out", metavar="FILE", help="Write the plan as JSON.")
_EXPORT = typer.Option(None, "--export", metavar="TARGET", help="Write TARGET's configuration and a script that runs.")


@takes_job
def run_plan(
    model: str,
    job: dict[str, Any],
    out: str | None = _OUT,
    export: str | None = _EXPORT,
    export_dir: str = EXPORT_DIR,
    for_version: str | None = FOR_VERSION,
    as_json: bool = AS_JSON,
) -> None:
    """Choose a configuration that fits the GPU and keeps the batch.

    Micro-batch, accumulation and checkpointing are chosen; the effective batch is kept exactly. What you fix
    stays fixed. Nothing is written unless --out or --export is given.

    \b
    Examples:
      brim plan meta-llama/Llama-3.1-8B --method qlora --gpu rtx-4090
      brim plan 7B --gpu 24GiB --seq-len 4096 --effective-batch-size 64
      brim plan ./my-model --method full --gpu h100:8 --out plan.json
      brim plan 7B --gpu auto --export trl --export-dir run
    """
    from brim import api

    plan = api.plan(model, **job, **aim_at(export, for_version, job))
    exported = api.export(plan, export, version=for_version) if export is not None else None
    next_commands = write_results(plan, out=out, exported=exported, folder=export_dir)
    print_plan(plan, next_commands or suggest_export(plan, model, job), as_json=as_json)

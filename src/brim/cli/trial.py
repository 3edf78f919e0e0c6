"""`brim trial`: real optimizer steps on the device, in a child process."""

from __future__ import annotations

from typing import Any

import typer

from brim.cli.options import AS_JSON, takes_job
from brim.cli.tried import print_trial, say_run, write_trial
from brim.errors import DoesNotFit

_DEVICE = typer.Option(
    None, "--device", metavar="auto|cpu:2GiB|24GiB", help="What runs it: this machine's GPU, held to a size, or a CPU."
)
_SCRIPT = typer.Option(None, "--script", metavar="FILE:FUNCTION", help="Your own trainer, run in the child process.")
_CLIMB = typer.Option(
    None, "--climb/--no-climb", help="Search for the fastest that fits (a model), or run one strategy (a plan)."
)
_OUT = typer.Option(None, "--out", metavar="FILE", help="Write the plan of what was chosen as JSON.")
_HTML = typer.Option(None, "--html", metavar="FILE", help="Draw memory against tokens/s.")


@takes_job
def run_trial(
    model: str,
    job: dict[str, Any],
    device: str | None = _DEVICE,
    script: str | None = _SCRIPT,
    climb: bool | None = _CLIMB,
    out: str | None = _OUT,
    html: str | None = _HTML,
    as_json: bool = AS_JSON,
) -> None:
    """Run real optimizer steps in a child process: does it fit, how fast is it, what is faster?

    MODEL is a model as for `brim plan`, or a plan.json. Weights are random and sequences as long as planned; nothing of
    yours is touched. Of a model the fastest strategy that fits is searched for in a few runs, at the fixed effective
    batch; of a plan its own is run. Exit code 3 if nothing fits.

    \b
    Examples:
      brim trial plan.json
      brim trial meta-llama/Llama-3.1-8B --method qlora --out plan.json
      brim trial Qwen/Qwen3-0.6B --device cpu:8GiB --seq-len 128
      brim trial plan.json --script train.py:make_trainer
      torchrun --nproc-per-node 2 -m brim trial plan.json
    """
    from brim import api
    from brim.checks.ranks import is_first

    first = is_first()
    say = say_run if first and not as_json else lambda run: None
    found = api.trial(model, device=device, script=script, climb=climb, say=say, **job)
    if not first:
        raise typer.Exit(0 if found.best is not None else DoesNotFit.exit_code)
    print_trial(found, write_trial(found, out=out, html=html), as_json=as_json)
    if found.best is None:
        raise typer.Exit(DoesNotFit.exit_code)

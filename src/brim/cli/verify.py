"""`brim verify`: do micro-batches train as the big batch does, and does a plan's strategy change nothing?"""

from __future__ import annotations

import typer

from brim.cli.options import AS_JSON
from brim.cli.proofs import print_proofs
from brim.errors import InvalidInput, NotExact, quoted

_SUBJECT = typer.Argument(
    ..., metavar="MODEL", show_default=False, help="A model as for `brim plan`, a plan.json, or train.py:make_trainer."
)
_TRAINER = typer.Option(None, "--trainer", metavar="NAME", help="hf, sft, dpo, plain, accelerate or lightning.")
_RANKS = typer.Option("1", "--ranks", metavar="N", help="Data-parallel ranks under torchrun: 1, 2, 4 or 8.")
_SHARDING = typer.Option("ddp", "--sharding", metavar="NAME", help="On several ranks: ddp or fsdp2.")
_GUARDED = typer.Option(False, "--guarded", help="Verify the loop made exact by brim, not as installed.")
_FULL = typer.Option(False, "--full-size", help="Your trainer's own model where it is, not a small copy on the CPU.")
_HTML = typer.Option(None, "--html", metavar="FILE", help="Draw the error of every split.")


def run_verify(
    subject: str = _SUBJECT,
    trainer: str | None = _TRAINER,
    ranks: str = _RANKS,
    sharding: str = _SHARDING,
    guarded: bool = _GUARDED,
    full_size: bool = _FULL,
    html: str | None = _HTML,
    as_json: bool = AS_JSON,
) -> None:
    """Prove that micro-batches add up to the big batch's gradient on your stack, or name what is wrong.

    A small copy of the model class is trained on the CPU with the real loop. Of a plan.json it is also proved that its
    strategy (checkpointing, kernels, padding-free, sharding) changes no gradient. Exit code 4 if a proof fails.

    \b
    Examples:
      brim verify google-t5/t5-base --trainer hf
      brim verify google-t5/t5-base --trainer hf --guarded
      brim verify train.py:make_trainer --ranks 2
      brim verify plan.json
    """
    from brim import api
    from brim.checks.ranks import leave_report
    from brim.checks.script import is_plan

    if not ranks.isdecimal():
        raise InvalidInput(f"--ranks must be 1, 2, 4 or 8, not {quoted(ranks)}")
    report = api.verify_accumulation(
        subject, trainer=trainer, ranks=int(ranks), sharding=sharding, guarded=guarded, full_size=full_size
    )
    if leave_report(report.describe()):
        return
    neutrality = api.verify_neutrality(subject) if is_plan(subject) else None
    print_proofs(report, neutrality, html, as_json=as_json)
    if not report.exact or (neutrality is not None and not neutrality.neutral):
        raise typer.Exit(NotExact.exit_code)

"""`brim schema`: the JSON schema of what `--json` prints."""

from __future__ import annotations

import typer

from brim.cli.output import print_json

_NAME = typer.Argument("plan", metavar="NAME", help="plan, estimate or run.")


def run_schema(name: str = _NAME) -> None:
    """Print the JSON schema of a record.

    \b
    Example:
      brim schema plan > plan.schema.json
    """
    from brim import api

    print_json(api.schema(name))

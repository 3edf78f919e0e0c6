"""How a refusal looks: what would help on stdout, one `error:` line on stderr, or one JSON object."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from typing import Any

from brim.cli.output import print_json, print_report
from brim.errors import BrimError, DoesNotFit, InvalidFile


def print_error(error: BrimError, *, as_json: bool) -> int:
    """Print an error raised on purpose and return its exit code."""
    if as_json:
        return _print_json(type(error).__name__, str(error), _list_facts(error), error.exit_code)
    if isinstance(error, DoesNotFit):
        from brim.report.refusal import format_does_not_fit

        with suppress(InvalidFile):  # a full stdout must not hide the refusal
            print_report(format_does_not_fit(error))
    print(f"error: {_one_line(error)}", file=sys.stderr)
    return error.exit_code


def print_bug(error: Exception, *, as_json: bool) -> int:
    """Print an error that nobody meant, without its traceback unless BRIM_DEBUG=1, and return 1."""
    if os.environ.get("BRIM_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    text = f"internal: {type(error).__name__}: {_one_line(error)}; please report it with the output of `brim env`"
    if as_json:
        return _print_json("Internal", text, {}, 1)
    print(f"error: {text}", file=sys.stderr)
    return 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _list_facts(error: BrimError) -> dict[str, Any]:
    relaxations = getattr(error, "relaxations", ())
    listed = [asdict(row) if is_dataclass(row) and not isinstance(row, type) else row for row in relaxations]
    return {**error.facts, **({"relaxations": listed} if listed else {})}


def _print_json(kind: str, message: str, facts: dict[str, Any], code: int) -> int:
    with suppress(InvalidFile):
        print_json({"error": {**facts, "type": kind, "message": message}})
    return code

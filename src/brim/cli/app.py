"""`brim`: one verb, one file; every error raised on purpose ends here as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from brim.cli.command import HELP_SETTINGS, make_command
from brim.cli.options import read_words
from brim.cli.output import writing
from brim.errors import BrimError, InvalidInput, UnknownName

INTERRUPTED = 130
VERBS = (
    "plan", "estimate", "trial", "verify", "export", "show", "history", "gpus", "models", "tasks", "optimizers", "env",
    "schema",
)  # fmt: skip
# Typer raises these from its own copy of click, or from click; the ancestors of its public error are both.
_UsageError: Any = typer.BadParameter.__base__


class Verbs(typer.core.TyperGroup):
    """Loads the file of a verb when it is asked for, and no other."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the verbs, the main job first."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of a verb."""
        if cmd_name in VERBS:
            return make_command(cmd_name)
        if ctx.resilient_parsing:
            return None
        raise UnknownName(kind="command", name=cmd_name, known=VERBS)


app = typer.Typer(cls=Verbs, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=HELP_SETTINGS)


def _print_version(wanted: bool) -> None:
    if wanted:
        from brim import __version__

        print(f"brim {__version__}")
        raise typer.Exit


@app.callback()
def describe(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """The training configuration that fits a GPU, is fastest, and trains exactly as the big batch would.

    \b
    Examples:
      brim plan meta-llama/Llama-3.1-8B --method qlora --gpu rtx-4090
      brim estimate 7B --gpu 24GiB --micro-batch-size 4 --by rule,formula
      brim plan 7B --gpu h100:8 --out plan.json --export trl

    Exit codes: 0 done, 2 bad input, 3 does not fit, 4 a proof failed, 5 a probe failed, 6 hub not reachable,
    1 our bug.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run `brim` on the words of a command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end the program
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return _run(words)
    except BrimError as error:
        from brim.cli.refuse import print_error

        return print_error(error, as_json="--json" in words)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        from brim.cli.refuse import print_bug

        return print_bug(error, as_json="--json" in words)


def _run(words: list[str]) -> int:
    first, *rest = words or ["--help"]
    try:
        if first in VERBS and "_BRIM_COMPLETE" not in os.environ:
            # Straight to the verb: the parser of the group costs a tenth of a second, and would only find the name.
            code = make_command(first)(args=read_words(rest), prog_name=f"brim {first}", standalone_mode=False)
        else:
            with writing():
                code = app(args=[first, *rest], prog_name="brim", standalone_mode=False)
                sys.stdout.flush()
    except _UsageError as error:
        raise InvalidInput(_describe_usage(error)) from None
    return code if isinstance(code, int) else 0


def _describe_usage(error: Any) -> str:
    """Return typer's complaint as one line that names the flag and where to read on."""
    flags = getattr(getattr(error, "param", None), "opts", None)
    text = error.message if flags and error.message else error.format_message()
    line = " ".join(str(text).split()).rstrip(".")
    line = f"{flags[0]}: {line}" if flags and error.message else line
    path = error.ctx.command_path if error.ctx is not None else "brim"
    return f"{line[:1].lower()}{line[1:]}; try `{path} -h`"

"""Where results go: text for people or JSON for programs to stdout, remarks to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from brim.errors import InvalidFile

if TYPE_CHECKING:
    from rich.console import RenderableType

PIPE_WIDTH = 100
_WIDEST = 120


def print_report(report: RenderableType) -> None:
    """Print a report as wide as the terminal, at most 120 columns; 100 into a pipe."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        console.width = min(console.width, _WIDEST)
    else:
        console.width = PIPE_WIDTH
    with writing(), console.capture() as captured:  # rich touches the stream when a capture ends
        console.print(report)
    # Tables fill their cells with blanks, which only get in the way of whoever copies or greps.
    _write("\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n")


def print_json(document: Mapping[str, Any]) -> None:
    """Print a JSON document; a fact that JSON has no type for becomes text."""
    import json

    _write(json.dumps(document, indent=2, default=str) + "\n")


def print_remark(text: str) -> None:
    """Print a line about what was done to stderr."""
    print(text, file=sys.stderr)


def _write(text: str) -> None:
    with writing():
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def writing() -> Iterator[None]:
    """Write to stdout inside: a reader that left is no error, a full disk is the user's to know.

    Raises:
        InvalidFile: stdout cannot be written.
    """
    try:
        yield
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _silence()
    except OSError as error:
        _silence()
        raise InvalidFile(path="standard output", problem=error.strerror or str(error)) from None


def _silence() -> None:
    """Send what is left of stdout nowhere, or Python complains when it flushes at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

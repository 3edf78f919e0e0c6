"""Commands to type next, broken so that they can be copied."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

_WORD = re.compile(r"(?:[^\s'\"]|'[^']*'|\"[^\"]*\"|['\"])+")


@dataclass(frozen=True, slots=True)
class Commands:
    """Shell commands; one that is too long continues on the next line behind a backslash."""

    commands: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Write each command within the width; a single word longer than that is folded."""
        for command in self.commands:
            yield Text("\n".join(break_command(command, options.max_width)), overflow="fold")


def break_command(command: str, width: int) -> list[str]:
    """Return the lines of a command, each but the last ending in a backslash; a flag stays with its value."""
    lines: list[str] = []
    for words in _pair_flags(_WORD.findall(command)):
        if lines and len(lines[-1]) + len(words) + 3 <= width:
            lines[-1] += f" {words}"
        else:
            lines.append(f"    {words}" if lines else words)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _pair_flags(words: Sequence[str]) -> Iterator[str]:
    kept = ""
    for word in words:
        if kept.startswith("--") and not word.startswith("--"):
            yield f"{kept} {word}"
            kept = ""
        else:
            if kept:
                yield kept
            kept = word
    if kept:
        yield kept

"""The commands of docs/formula.md print what stands under them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from brim.cli.app import main

PAGE = Path(__file__).parents[2] / "docs/formula.md"
BLOCK = re.compile(r"^```console\n\$ brim ([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(PAGE.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(("command", "shown"), BLOCKS, ids=lambda text: text[:40])
def test_the_page_shows_what_is_printed(command: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line under a command is a line of its output."""
    assert main(shlex.split(command)) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in shown.splitlines() if line.rstrip() not in printed] == []


def test_the_page_has_examples() -> None:
    """Nobody took them out."""
    assert len(BLOCKS) == 2

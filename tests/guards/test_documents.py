"""What the README and the docstrings show is what happens."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import brim
from brim.cli.app import main

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Commands that cannot answer the same on every machine.
ELSEWHERE = ("--gpu auto", "--refresh", "brim env")


def list_commands() -> Iterator[tuple[str, str]]:
    """Yield each `$ brim` command of the README and what stands under it."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    for block in BLOCK.findall(text):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.replace("\\\n", " ").partition("\n")
            if command.startswith("brim ") and not any(words in command for words in ELSEWHERE):
                yield command.split(" | ")[0], output.strip("\n")


def test_readme_commands_run_and_say_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not README.exists():
        pytest.skip("there is no README.md yet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("COLUMNS", raising=False)  # lines as wide as in a pipe
    commands = list(list_commands())
    assert commands
    for command, shown in commands:
        code = main(shlex.split(command, comments=True)[1:])
        said = capsys.readouterr()
        assert code in (0, 3, 4), (command, said.err)  # fits, does not fit, not exact
        if shown:
            first = shown.splitlines()[0].rstrip()
            assert first in [line.rstrip() for line in (said.out + said.err).splitlines()], command


def test_docstring_examples_run() -> None:
    for found in pkgutil.walk_packages(brim.__path__, "brim."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            assert doctest.testmod(module).failed == 0, found.name

"""Runs `brim` in this process, offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from brim.cli.app import main

JOB = ("8B", "--method", "qlora", "--gpu", "rtx-4090")


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The JSON on stdout."""
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here asks the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("BRIM_DEBUG", raising=False)


@pytest.fixture
def brim(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Return a function that runs a command line."""

    def run(*words: str) -> Result:
        code = main(words)
        said = capsys.readouterr()
        return Result(code, said.out, said.err)

    return run


@pytest.fixture
def job() -> tuple[str, ...]:
    """Return a job that fits: QLoRA of an 8B model on one RTX 4090."""
    return JOB

"""Every test has a store of its own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of the store; it is not there yet."""
    path = tmp_path / "data" / "history.sqlite"
    monkeypatch.setenv("BRIM_HISTORY", str(path))
    return path

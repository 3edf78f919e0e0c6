"""`import brim` and `brim plan` load nothing heavy: a first answer must not wait for torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = (
    "torch", "transformers", "trl", "datasets", "huggingface_hub", "numpy", "pandas", "peft", "accelerate", "requests",
    "httpx", "matplotlib", "pydantic", "jinja2", "yaml",
)  # fmt: skip
REPORT = f"import sys; print('LOADED', *sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)"


def list_loaded(code: str) -> list[str]:
    """Return the heavy modules that a fresh interpreter has loaded after `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr.rpartition("LOADED")[2].split()


def test_importing_brim_loads_nothing() -> None:
    assert list_loaded("import brim") == []


@pytest.mark.parametrize("words", [
    ["plan", "8B", "--method", "qlora", "--gpu", "rtx-4090"],
    ["plan", "8B", "--method", "qlora", "--gpu", "rtx-4090", "--json"],
    ["estimate", "8B", "--method", "qlora", "--gpu", "rtx-4090", "--by", "rule,formula"],
])  # fmt: skip
def test_planning_loads_nothing_heavy(words: list[str]) -> None:
    assert list_loaded(f"from brim.cli.app import main; assert main({words!r}) == 0") == []


def test_a_planted_import_is_found() -> None:
    assert list_loaded("import sys, types; sys.modules['torch'] = types.ModuleType('torch')") == ["torch"]

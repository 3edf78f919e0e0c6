"""Sizes are written by `units.format_size` and the report, percent by the report and the planner's sentences."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import brim

ROOT = Path(brim.__file__).parent
WRITES_SIZES = ("units.py", "report/")
WRITES_PERCENT = ("units.py", "report/", "planner/")
SIZE_UNIT = re.compile(r"\b[KMGT]iB\b")


def find_size_texts(source: str) -> Iterator[str]:
    """Yield f-strings that put a number before a size unit."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            for value, after in zip(node.values, node.values[1:], strict=False):
                text = str(after.value).lstrip() if isinstance(after, ast.Constant) else ""
                if isinstance(value, ast.FormattedValue) and SIZE_UNIT.match(text):
                    yield ast.unparse(node)


def find_percent_texts(source: str) -> Iterator[str]:
    """Yield f-strings that format a number as percent."""
    for node in ast.walk(ast.parse(source)):
        spec = node.format_spec if isinstance(node, ast.FormattedValue) else None
        parts = spec.values if isinstance(spec, ast.JoinedStr) else ()
        if any(isinstance(part, ast.Constant) and "%" in str(part.value) for part in parts):
            yield ast.unparse(node)


def find_outside(find: object, rooms: tuple[str, ...]) -> list[str]:
    assert callable(find)
    bad = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(rooms):
            bad += [f"{name}: {text}" for text in find(path.read_text(encoding="utf-8"))]
    return bad


def test_sizes_are_formatted_in_one_place() -> None:
    assert find_outside(find_size_texts, WRITES_SIZES) == []


def test_percent_is_formatted_in_few_places() -> None:
    assert find_outside(find_percent_texts, WRITES_PERCENT) == []


def test_planted_texts_are_found() -> None:
    assert list(find_size_texts('f"needs {size / 2**30:.1f} GiB"'))
    assert list(find_percent_texts('f"{share:.0%} of it"'))
    assert not list(find_size_texts('f"--gpu 24GiB is {meant}"'))
    assert not list(find_percent_texts('f"{share:.2f} % x"'))

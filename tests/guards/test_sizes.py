"""Files, functions and verbs stay small enough to be read in one go; no room is called after nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from statistics import median

import brim

ROOT = Path(brim.__file__).parent
PATHS = sorted(ROOT.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_MEDIAN, LONGEST_VERB = 400, 60, 12, 60
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "manager", "common", "base", "misc"}


def list_functions(source: str) -> list[tuple[str, int]]:
    """Return the functions of a source with their lines of code, docstring left out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                lines -= (first.end_lineno or first.lineno) - first.lineno + 1
            found.append((node.name, lines))
    return found


def test_no_file_is_long() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in PATHS}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}
    verbs = {name: length for name, length in lengths.items() if name.startswith("cli/") and has_verb(ROOT / name)}
    assert len(verbs) >= 10
    assert {name: length for name, length in verbs.items() if length > LONGEST_VERB} == {}


def has_verb(path: Path) -> bool:
    return f"def run_{path.stem}(" in path.read_text(encoding="utf-8")


def test_no_function_is_long() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{name}": lines
        for path in PATHS
        for name, lines in list_functions(path.read_text(encoding="utf-8"))
    }
    assert {name: lines for name, lines in found.items() if lines > LONGEST_FUNCTION} == {}
    assert median(found.values()) <= LONGEST_MEDIAN


def test_a_long_function_is_found() -> None:
    source = "def f():\n    '''Doc.'''\n" + "    x = 1\n" * 61
    assert list_functions(source) == [("f", 62)]


def test_nothing_has_an_empty_name() -> None:
    names = {part for path in PATHS for part in path.relative_to(ROOT).with_suffix("").parts}
    classes = {
        word.lower()
        for path in PATHS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        for word in re.findall(r"[A-Z][a-z]+", node.name)
    }
    assert not (names | classes) & EMPTY_NAMES

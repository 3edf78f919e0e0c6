"""Imports go down only, siblings never import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import brim

ROOT = Path(brim.__file__).parent
# Top first. Rooms on one line are siblings. `units` raises an error of `errors`, so it stands above it.
LAYERS = (
    ("__main__",), ("cli",), ("api",), ("report",), ("trials",),
    ("readers", "probes", "exporters", "runtime", "checks", "history"),
    ("planner",), ("losses", "devices", "cost"), ("tables",), ("spec",), ("units", "files", "versions"), ("errors",),
)  # fmt: skip
# `_repr_html_` asks the report on first display; the package itself hands out names lazily.
EXCEPTIONS = {("brim.planner.record", "brim.report.html"), ("brim.checks.report", "brim.report.exactness")}


def name_module(path: Path) -> str:
    parts = ("brim", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_imports(source: str, module: str) -> Iterator[str]:
    """Yield every brim module or name that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "brim")
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            if origin.split(".")[0] == "brim":
                yield from (f"{origin}.{alias.name}" for alias in node.names)


def find_bad_imports(source: str, module: str) -> list[str]:
    """Return the imports that go up or sideways."""
    levels = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
    room = module.split(".")[1]
    bad = []
    for target in find_imports(source, module):
        parts = target.split(".")
        other = parts[1] if len(parts) > 1 else ""
        lazy = any(module == above and target.startswith(below) for above, below in EXCEPTIONS)
        if other in levels and other != room and levels[other] <= levels[room] and not lazy:
            bad.append(f"{module} imports {target}")
    return bad


def test_imports_go_down_only() -> None:
    paths = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    assert len(paths) > 30
    bad = [text for path in paths for text in find_bad_imports(path.read_text(encoding="utf-8"), name_module(path))]
    assert not bad


def test_every_room_has_a_floor() -> None:
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} <= {room for rooms in LAYERS for room in rooms}


def test_a_planted_import_is_found() -> None:
    up = "def f():\n    from brim.planner.plan import plan_workload"
    assert find_bad_imports(up, "brim.cost.estimate") == ["brim.cost.estimate imports brim.planner.plan.plan_workload"]
    assert find_bad_imports("import brim.exporters", "brim.readers.hub")
    assert find_bad_imports("from brim import api", "brim.report.plan")
    assert find_bad_imports("from ..planner import plan", "brim.cost.estimate")
    assert find_bad_imports("from brim.report import html", "brim.planner.plan")
    assert not find_bad_imports("from brim.units import GIB\nimport json", "brim.cost.estimate")
    assert not find_bad_imports("from brim.report.html import format_plan_html", "brim.planner.record")

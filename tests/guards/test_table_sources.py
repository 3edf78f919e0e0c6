"""Every row of every table says where it comes from and when that was read."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import brim

TABLES = Path(brim.__file__).parent / "tables"

OWN_CHOICES = ("sizes.toml",)
"""Tables of brim's own decisions: a reason stands for the source."""


def list_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(TABLES.glob("*.toml")):
        for key, rows in tomllib.loads(path.read_text(encoding="utf-8")).items():
            for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
                yield f"{path.name}:{key}[{number}]", row
    for path in sorted(TABLES.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            yield f"{path.name}:{number + 1}", json.loads(line)


def test_every_row_has_a_source_and_a_date() -> None:
    rows = list(list_rows())
    assert len(rows) > 200
    sourced = [(where, row) for where, row in rows if not where.startswith(OWN_CHOICES)]
    missing = [where for where, row in sourced if not (row.get("source") and row.get("retrieved"))]
    assert missing == []


def test_own_choices_have_a_reason() -> None:
    rows = [row for where, row in list_rows() if where.startswith(OWN_CHOICES)]
    assert rows and all(row.get("reason") for row in rows)


def test_dates_are_dates() -> None:
    for where, row in list_rows():
        if "retrieved" in row:
            assert date(2020, 1, 1) <= date.fromisoformat(row["retrieved"]), where

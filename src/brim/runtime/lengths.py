"""The longest sequence of a dataset, where that costs next to nothing to know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOST_ROWS = 100_000
_COUNTED, _COUNTS = ("input_ids", "chosen_input_ids", "rejected_input_ids"), ("length", "lengths")


def find_longest(dataset: Any) -> int | None:
    """Return the tokens of a dataset's longest sequence; None where every row would have to be made to know.

    A `datasets.Dataset` with a column of ids or lengths is asked as a whole (rows that were filtered out may count), a
    list of rows row by row.
    """
    table = getattr(getattr(dataset, "data", None), "table", None)
    if table is not None:
        return _ask_table(table)
    if isinstance(dataset, (list, tuple)) and 0 < len(dataset) <= _MOST_ROWS and isinstance(dataset[0], dict):
        return max((count_tokens(row) for row in dataset), default=0) or None
    return None


def _ask_table(table: Any) -> int | None:
    import pyarrow.compute as pc

    found = [pc.max(table.column(name)).as_py() for name in _COUNTS if name in table.column_names]
    if not found:
        columns = [table.column(name) for name in _COUNTED if name in table.column_names]
        found = [pc.max(pc.list_value_length(column)).as_py() for column in columns]
    whole = [number for number in found if isinstance(number, int) and number > 0]
    return max(whole, default=None)


def count_tokens(row: Any) -> int:
    """Return the tokens of a row, of its longest column where it has several; 0 if it has none."""
    if not isinstance(row, Mapping):
        return 0
    return max((len(row[name]) for name in _COUNTED if hasattr(row.get(name), "__len__")), default=0)

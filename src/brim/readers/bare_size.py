"""Bare sizes such as `7B`: which one of the table is meant, and what to say if none is."""

from __future__ import annotations

import re

from brim.errors import UnknownName
from brim.tables.read import list_sizes

_SIZE = re.compile(r"\s*(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})\s*([mbt])\s*", re.ASCII | re.IGNORECASE)
_PARAMETERS = {"m": 10**6, "b": 10**9, "t": 10**12}


def find_size(name: str) -> str | None:
    """Return the size of the table that a text means (`7.0b` means `7B`, `1000M` means `1B`), None if it is no size.

    Raises:
        UnknownName: a size that no built-in model has; the text names the nearest ones.
    """
    wanted = _count_parameters(name)
    if wanted is None:
        return None
    known = {count: size.name for size in list_sizes() if (count := _count_parameters(size.name)) is not None}
    if wanted in known:
        return known[wanted]
    below = max((count for count in known if count < wanted), default=None)
    above = min((count for count in known if count > wanted), default=None)
    nearest = " and ".join(known[count] for count in (below, above) if count is not None)
    hint = f"no card of {name.strip()}; nearest {nearest}; `brim models` lists all"
    raise UnknownName(kind="model", name=name, known=(), hint=hint)


def _count_parameters(name: str) -> int | None:
    match = _SIZE.fullmatch(name[:64])
    return round(float(match[1]) * _PARAMETERS[match[2].lower()]) if match else None

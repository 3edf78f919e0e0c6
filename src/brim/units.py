"""Bytes, and how people write them."""

from __future__ import annotations

import re

from brim.errors import InvalidSize

KIB = 2**10
MIB = 2**20
GIB = 2**30

_FACTORS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "kib": KIB,
    "m": 10**6, "mb": 10**6, "mib": MIB,
    "g": 10**9, "gb": 10**9, "gib": GIB,
    "t": 10**12, "tb": 10**12, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*")
_LARGEST_BYTES = 2**60


def parse_size(text: str) -> int:
    """Return the bytes a size such as `24GiB`, `80 GB` or `500mb` stands for.

    Args:
        text: a number and a unit; `GB` is 1e9 bytes, `GiB` is 2**30 bytes, any case.

    Raises:
        InvalidSize: the text is no size, or is zero or beyond 2**60 bytes.
    """
    match = _SIZE.fullmatch(text[:64])
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise InvalidSize(text=text)
    size_bytes = round(float(match[1]) * factor)
    if not 0 < size_bytes <= _LARGEST_BYTES:
        raise InvalidSize(text=text)
    return size_bytes


def format_size(size_bytes: float, digits: int = 2) -> str:
    """Return bytes as text in GiB, or in MiB below 0.1 GiB, with the unit."""
    if abs(size_bytes) < 0.1 * GIB:
        return f"{size_bytes / MIB:,.1f} MiB"
    return f"{size_bytes / GIB:,.{digits}f} GiB"

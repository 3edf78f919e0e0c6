"""One JSON object out of a file that nobody vouches for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from brim.errors import InvalidConfig
from brim.readers.regular_file import open_regular
from brim.units import format_size

LARGEST_BYTES = 5_000_000
"""More than ten times the largest config.json seen (vision models that list 21,000 labels), bytes."""


def read_json_object(path: str) -> Mapping[str, Any]:
    """Return the JSON object a file holds; of a repeated key the last value counts.

    Args:
        path: a regular file, or a link to one.

    Raises:
        InvalidFile: missing, unreadable, or no regular file.
        InvalidConfig: over 5 MB, not UTF-8, not JSON, nested too deeply, not finite, or no object.
    """
    try:
        value = json.loads(_read_text(path), parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise InvalidConfig(source=path, path="the file", problem="is nested too deeply") from None
    except ValueError as error:
        raise InvalidConfig(source=path, path="the file", problem=f"is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidConfig(source=path, path="the file", problem="must hold a JSON object at the top level")
    return value


def refuse_large(size_bytes: int, source: str) -> None:
    """Raise InvalidConfig if a config of that many bytes is beyond what a model config can be."""
    if size_bytes > LARGEST_BYTES:
        problem = f"is {format_size(size_bytes)}; a config.json has at most {format_size(LARGEST_BYTES)}"
        raise InvalidConfig(source=source, path="the file", problem=problem)


def _read_text(path: str) -> str:
    with open_regular(path) as (file, size_bytes):
        refuse_large(size_bytes, path)
        # One byte more, for files that lie about their size (/proc) or grow.
        data = file.read(LARGEST_BYTES + 1)
    refuse_large(len(data), path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidConfig(source=path, path="the file", problem="is not UTF-8 text") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number beyond the range of a float")
    return number

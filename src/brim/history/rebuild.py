"""From the store's JSON to records, without pydantic: what lies in the store was checked when it was put there.

A plan reads the store too, and importing pydantic would take longer than planning.
"""

from __future__ import annotations

import types
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@cache
def list_kinds(record: type) -> tuple[tuple[Field[Any], Any], ...]:
    """Return the fields of a record with their resolved types."""
    hints = get_type_hints(record)
    return tuple((field, hints[field.name]) for field in fields(record))


def rebuild(kind: Any, value: Any) -> Any:
    """Return the value of a type that a JSON value stands for; a record that was rebuilt already stays.

    Keys that the record lacks are passed over: a newer brim, which adds keys, may write to the same store.

    Raises:
        ValueError: a key is missing, or a value is none of its type.
    """
    if hasattr(kind, "__dataclass_fields__"):
        return value if type(value) is kind else _rebuild_record(kind, value)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is tuple:
        return _rebuild_tuple(parts, value)
    if origin in (Union, types.UnionType):
        return _rebuild_choice(parts, value)
    if origin is Literal:
        return _expect(value in parts, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _expect(type(value) is kind, value)


def _expect(holds: bool, value: Any) -> Any:
    if not holds:
        raise ValueError(f"{value!r:.80} does not belong here")
    return value


def _rebuild_record(kind: Any, value: Any) -> Any:
    _expect(isinstance(value, dict), value)
    found = {}
    for field, hint in list_kinds(kind):
        if field.name in value:
            found[field.name] = rebuild(hint, value[field.name])
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{kind.__name__} lacks {field.name}")
    return kind(**found)


def _rebuild_tuple(parts: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    _expect(isinstance(value, list), value)
    if len(parts) == 2 and parts[1] is Ellipsis:
        return tuple(rebuild(parts[0], one) for one in value)
    _expect(len(parts) == len(value), value)
    return tuple(rebuild(part, one) for part, one in zip(parts, value, strict=True))


def _rebuild_choice(parts: tuple[Any, ...], value: Any) -> Any:
    """Return the value as the first type that takes it; of records, the one that has all its keys first."""
    if value is None and types.NoneType in parts:
        return None
    choices = [part for part in parts if part is not types.NoneType]
    if isinstance(value, dict):
        choices.sort(key=lambda part: len(value.keys() ^ {field.name for field, _ in list_kinds(part)}))
    for choice in choices:
        try:
            return rebuild(choice, value)
        except ValueError:
            continue
    raise ValueError(f"{value!r:.80} does not belong here")

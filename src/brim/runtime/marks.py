"""Where a trainer's counters and lists of metrics stood, so that what a failed attempt added is taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LOOP_OWNED = ("current_flos", "current_gradient_accumulation_steps")
"""Counters that the training loop moves between micro-batches. Source: transformers/trainer.py, `_run_epoch`."""


class Marks:
    """Marks in everything that an object holds of numbers and containers of them; it costs the keys, not the lists."""

    def __init__(self, holder: Any, skip: tuple[str, ...] = ("_exact_", "_recover_")) -> None:
        self._holder = holder
        self._marks = {
            name: (value, _mark(value))
            for name, value in vars(holder).items()
            if not name.startswith(skip) and name not in _LOOP_OWNED and _may_move(value)
        }

    def restore(self) -> None:
        """Take back what was added since."""
        for name, (value, mark) in self._marks.items():
            _go_back(value, mark)
            setattr(self._holder, name, value)


def _may_move(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(part, (int, float, str)) or _may_move(part) for part in value.values())
    if isinstance(value, list):
        return not value or isinstance(value[-1], (int, float))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _mark(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: (part, _mark(part)) for key, part in value.items()}
    return len(value) if isinstance(value, list) else None


def _go_back(value: Any, mark: Any) -> None:
    if isinstance(value, list):
        del value[mark:]
    elif isinstance(value, dict):
        for key in set(value) - set(mark):
            del value[key]
        for key, (part, inner) in mark.items():
            _go_back(part, inner)
            value[key] = part

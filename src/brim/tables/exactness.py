"""Which heads accumulate exactly under which loop, as measured: rows of `exactness.jsonl`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

LOOP_OF_TRAINER = {
    "trl": "sft", "trl-dpo": "dpo", "unsloth": "sft", "transformers": "hf", "accelerate": "accelerate",
    "plain": "plain",
}  # fmt: skip
"""The loop of the table, and of `brim verify`, that a plan's trainer runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactness:
    """What one class does under one loop, as installed."""

    architecture: str
    """Class of transformers."""
    loop: str
    """hf, sft, accelerate or lightning."""
    transformers: str
    """Release that was measured."""
    exact: bool
    """Whether every split gave the gradient of the big batch."""
    error: float
    """Worst relative error of a gradient."""
    told: tuple[str, ...]
    """What is wrong, in words."""


def find_exactness(architecture: str, loop: str) -> Exactness | None:
    """Return what the newest release that was measured does; None if nobody has measured the class under the loop."""
    found = [row for row in _rows(architecture) if row.loop == loop]
    return max(found, key=lambda row: _order(row.transformers), default=None)


@cache
def _rows(architecture: str) -> tuple[Exactness, ...]:
    text = files("brim.tables").joinpath("exactness.jsonl").read_text(encoding="utf-8")
    wanted = f'"class": "{architecture}"'  # a few of hundreds of lines: the others need not be read
    rows = [json.loads(line) for line in text.splitlines() if wanted in line]
    return tuple(
        Exactness(
            architecture=architecture, loop=row["loop"], transformers=row["transformers"],
            exact=row["installed"]["exact"], error=row["installed"]["error"], told=tuple(row["installed"]["told"]),
        )
        for row in rows
        if "exact" in row["installed"]
    )  # fmt: skip


def _order(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part.isdecimal())

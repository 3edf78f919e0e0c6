"""How fast a run goes: seconds, steps and tokens, without waiting for the device in any step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from brim.runtime.tokens import count_tokens

_MOST_SUMS = 256


class Mark(NamedTuple):
    """What has been done since the first step; two marks differ by a stretch of the run."""

    seconds: float = 0.0
    """Time of the steps, evaluation and saving left out."""
    steps: int = 0
    """Optimizer steps."""
    run_tokens: int = 0
    """Tokens that were run, padding included."""
    real_tokens: int = 0
    """Tokens that were no padding."""

    def since(self, other: Mark) -> Mark:
        """Return what was done since another mark."""
        return Mark(*(now - before for now, before in zip(self, other, strict=True)))


class Pace:
    """Counts steps, their time and their tokens. The first step is left out: it warms up, and guard measures in it.

    Masks are summed where they are; the sums are read when `read` is called, which waits for the device.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin; `clock` gives seconds."""
        self._clock = clock
        self._mark: float | None = None
        self._total, self._sums, self._pending, self._tokens = Mark(), [], [], (0, 0)
        self._shape = self._first_shape = self._most_shape = (0, 0)
        self.first_seconds: float | None = None

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest sequence of whole steps, padding included."""
        return (self._most_shape if self._most_shape[0] else self._first_shape)[0]

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest micro-batch of whole steps."""
        return (self._most_shape if self._most_shape[0] else self._first_shape)[1]

    def begin_step(self) -> None:
        """Let time run, unless it runs since the last step ended: fetching data is part of a step."""
        if self._mark is None:
            self._mark = self._clock()

    def pause(self) -> None:
        """Forget the time since the last step ended: the loop did something else, such as evaluation."""
        self._mark = None

    def add(self, inputs: Any) -> None:
        """Count a micro-batch."""
        found = count_tokens(inputs)
        if found is None:
            return
        self._pending += [mask.sum() for mask in found.masks]
        run, unmasked = self._tokens
        self._tokens = run + found.run, unmasked + found.unmasked
        self._shape = _larger(self._shape, (found.longest, found.run))

    def end_step(self) -> None:
        """Count a step."""
        now = self._clock()
        seconds = now - self._mark if self._mark is not None else None
        (run, unmasked), sums = self._tokens, self._pending
        shape, self._shape = self._shape, (0, 0)
        self._tokens, self._pending, self._mark = (0, 0), [], now
        if self.first_seconds is None:
            self.first_seconds, self._first_shape = seconds if seconds is not None else 0.0, shape
            return
        self._most_shape = _larger(self._most_shape, shape)
        if seconds is None:
            return
        total = self._total
        self._total = Mark(total.seconds + seconds, total.steps + 1, total.run_tokens + run,
                           total.real_tokens + unmasked)  # fmt: skip
        self._sums += sums
        if len(self._sums) > _MOST_SUMS:
            self._sums = [_add(self._sums)]

    def drop_step(self) -> None:
        """Leave out the step that ends now: it was run twice, or its peak is left out too."""
        self._tokens, self._pending, self._shape, self._mark = (0, 0), [], (0, 0), self._clock()

    def forget_shapes(self) -> None:
        """Forget the largest shapes so far, with the peaks that belonged to them."""
        self._first_shape = self._most_shape = (0, 0)

    def read(self) -> Mark:
        """Return what has been done since the first step; waits for the device if tokens are counted there."""
        if self._sums:
            number = int(_add(self._sums))
            self._sums, self._total = [], self._total._replace(real_tokens=self._total.real_tokens + number)
        return self._total


def _larger(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), max(one[1], other[1])


def _add(sums: list[Tensor]) -> Tensor:
    return torch.stack([one.to(torch.int64) for one in sums]).sum()

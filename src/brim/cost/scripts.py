"""A block's events as a script for the caching allocator: storages by number, bytes for one micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from brim.cost.allocator import CachingAllocator
from brim.cost.blocks import Block
from brim.cost.tape import Event

Act = tuple[int, int]
"""A storage's number and the bytes to allocate for it; 0 releases it."""


class Script(NamedTuple):
    """What one pass through a block asks of the allocator.

    Input and gradient of the output are there before, output and gradient of the input stay after it: blocks hand
    them on, so none is allocated twice.
    """

    num_storages: int
    """Storages are numbered from 0 to this."""
    stream_bytes: int
    """Bytes of the input, and of its gradient."""
    stream: int | None
    """Number of the input where the backward pass needs it and releases it."""
    forward: tuple[Act, ...]
    """Forward pass that records."""
    output: Act
    """Its output."""
    kept: tuple[Act, ...]
    """What waits for the backward pass, input and output apart."""
    gradient: Act
    """Gradient of the output."""
    backward: tuple[Act, ...]
    """Backward pass: releases everything but the gradient of the input."""
    stream_gradient: int
    """Number of that gradient."""
    evaluation: tuple[Act, ...]
    """Forward pass that records nothing."""
    evaluation_output: Act
    """Its output."""


class Player(CachingAllocator):
    """A caching allocator that plays scripts and names storages itself."""

    def __init__(self, *, capacity_bytes: int | None, expandable: bool) -> None:
        super().__init__(capacity_bytes=capacity_bytes, expandable=expandable)
        self._names = 0

    def hold(self, *sizes: int) -> list[int]:
        """Allocate storages, those of no size left out; return their names."""
        first = self._names + 1
        sizes = tuple(size for size in sizes if size > 0)
        self._names += len(sizes)
        for name, size in enumerate(sizes, first):
            self.allocate(name, size)
        return list(range(first, self._names + 1))

    def drop(self, names: list[int]) -> None:
        """Release storages and empty the list."""
        for name in names:
            self.free(name)
        names.clear()

    def name(self, script: Script) -> int:
        """Set names aside for the storages of a script; return the first."""
        base = self._names + 1
        self._names += script.num_storages
        return base

    def play(self, acts: Iterable[Act], base: int) -> None:
        """Run acts on storages named from `base` on."""
        for number, size in acts:
            if size:
                self.allocate(base + number, size)
            else:
                self.free(base + number)

    def play_among(self, acts: Sequence[Act], base: int, sizes: Sequence[int]) -> list[int]:
        """Run acts and hold storages evenly spread among them; return the names of these."""
        held, start = [], 0
        for index, size in enumerate(sizes, 1):
            stop = len(acts) * index // (len(sizes) + 1)
            self.play(acts[start:stop], base)
            held += self.hold(size)
            start = stop
        self.play(acts[start:], base)
        return held


def write_script(block: Block, tokens: int) -> Script:
    """Return the script of a block for a micro-batch of that many tokens."""
    evaluation, forward = block.evaluation_events, block.forward_events
    bare, numbers = _number(evaluation), _number((*forward, *block.backward_events))
    bare_acts = _acts(evaluation, bare, tokens)
    # Both forward passes make the same storages in the same order; the one that records has the input before them.
    has_stream = _count_made(forward) > _count_made(evaluation)
    bare_output, stream = _alive(bare_acts)[-1], 0 if has_stream else None
    output = (bare_output[0] + has_stream, bare_output[1])
    acts = tuple(act for act in _acts(forward, numbers, tokens) if act[0] != stream)
    kept = tuple(act for act in _alive(acts) if act[0] != output[0])
    gradient, *back = (act for act in _acts(block.backward_events, numbers, tokens) if act[0] != output[0])
    *unused, (stream_gradient, _) = _alive((*kept, *([(0, 1)] if has_stream else []), gradient, *back))
    return Script(
        num_storages=max(len(numbers), len(bare)), stream_bytes=block.stream.at(tokens), stream=stream, forward=acts,
        output=output, kept=kept, gradient=gradient, backward=(*back, *((number, 0) for number, _ in unused)),
        stream_gradient=stream_gradient, evaluation=bare_acts, evaluation_output=bare_output,
    )  # fmt: skip


def find_last_large(script: Script) -> int:
    """Return where the backward pass releases the last storage at least half as large as its largest."""
    sizes = dict([*script.kept, script.gradient, *(act for act in script.backward if act[1])])
    large = max(sizes.values()) / 2
    acts = enumerate(script.backward)
    return max((index for index, (number, size) in acts if not size and sizes.get(number, 0) >= large), default=0)


def _count_made(events: Iterable[Event]) -> int:
    return sum(event.allocates for event in events)


def _number(events: Iterable[Event]) -> dict[int, int]:
    """Number storages in the order they are made."""
    made = dict.fromkeys(event.key for event in events if event.allocates)
    return {key: number for number, key in enumerate(made)}


def _acts(events: Iterable[Event], numbers: dict[int, int], tokens: int) -> tuple[Act, ...]:
    """Return the events as acts; storages of no size ask for nothing."""
    sized = ((event, event.size.at(tokens)) for event in events)
    return tuple((numbers[event.key], size if event.allocates else 0) for event, size in sized if size)


def _alive(acts: Iterable[Act]) -> list[Act]:
    """Return what is there after some acts, in the order it was made."""
    alive: dict[int, int] = {}
    for number, size in acts:
        if size:
            alive[number] = size
        else:
            alive.pop(number)
    return list(alive.items())

"""Layers repeat: a step of four repeats, unfolded into the step of as many as the model has.

Memory is a stream of allocations and frees. Where alike layers run one after another, the stream repeats itself with
other storages; the stream of an inner repeat stands for those that were left out. Whether the two inner repeats really
did the same is checked, event by event. What repeats may be one layer or a pattern of several (five with a window, one
without), and layers before and after it may differ (dense ones before those with experts).

Leaves out: that the vector of norms, which clipping stacks, grows by 4 bytes per trained tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from brim.probes.model import cut_layers, find_layers
from brim.probes.pieces import STRIDE, Event, Piece, repeat_events, split_steps
from brim.probes.tracker import Storage

_KEPT = 4
"""Repeats that run: the first, two inner ones that are compared, the last."""
_LONGEST_PATTERN = 12


@dataclass(frozen=True, slots=True)
class Pattern:
    """How the layers of a model repeat."""

    before: int
    """Layers before the first repeat."""
    length: int
    """Layers of one repeat."""
    repeats: int
    """Repeats the model has."""
    num_layers: int
    """Layers the model has."""

    @property
    def kept(self) -> int:
        """Layers that run."""
        return self.num_layers - self.length * (self.repeats - _KEPT)

    @property
    def middle(self) -> int:
        """Number of the unit that stands for those left out; units are layers, but each repeat is one."""
        return self.before + 1

    @property
    def missing(self) -> int:
        """Repeats that are left out."""
        return self.repeats - _KEPT

    def unit_of(self, layer: int) -> int:
        """Return the unit of a layer that runs; -1 for what belongs to none."""
        if layer < self.before:
            return layer
        inside = layer - self.before
        covered = _KEPT * self.length
        return self.before + (inside // self.length if inside < covered else _KEPT + inside - covered)


class Place(NamedTuple):
    """Where a storage was made: which sweep over the units, which unit, and how many storages before it."""

    sweep: int
    unit: int
    ordinal: int


@dataclass(slots=True)
class _Run:
    """Consecutive events of one unit, or of none (-1)."""

    unit: int
    events: list[Event]
    sweep: int = -1


def fold_layers(model: torch.nn.Module) -> Pattern | None:
    """Cut the repeated layers of a model down to four repeats, and return how they repeated; None if nothing is cut."""
    layers = find_layers(model)
    if layers is None:
        return None
    holder = next((one for one in model.modules() if any(child is layers for child in one.children())), None)
    config = getattr(holder, "config", None)
    lists = _per_layer_lists(config, len(layers))
    kinds = [
        _describe(layer) + repr([values[index] for values in lists.values()]) for index, layer in enumerate(layers)
    ]
    pattern = find_pattern(kinds)
    if pattern is None or not _shorten_config(model, config, lists, pattern):
        return None
    cut_layers(layers, _cut(pattern))
    return pattern


def find_pattern(kinds: Sequence[str]) -> Pattern | None:
    """Return the pattern of layers of these kinds that leaves the fewest to run; None if none leaves any out."""
    best = None
    for length in range(1, min(_LONGEST_PATTERN, len(kinds) // _KEPT) + 1):
        start = 0
        for index in range(length, len(kinds) + 1):
            if index < len(kinds) and kinds[index] == kinds[index - length]:
                continue
            repeats = (index - start) // length
            found = Pattern(start, length, repeats, len(kinds))
            if repeats > _KEPT and (best is None or found.kept < best.kept):
                best = found
            start = index - length + 1
    return best


def _cut(pattern: Pattern) -> slice:
    first = pattern.before + 2 * pattern.length
    return slice(first, first + pattern.missing * pattern.length)


def _per_layer_lists(config: Any, num_layers: int) -> dict[str, list[Any]]:
    """Return the entries of a config that say something of each layer."""
    values = vars(config).items() if config is not None else ()
    return {name: list(one) for name, one in values if isinstance(one, (list, tuple)) and len(one) == num_layers}


def _shorten_config(model: torch.nn.Module, config: Any, lists: Mapping[str, list[Any]], pattern: Pattern) -> bool:
    """Give every module that holds the config a copy that fits the layers that run: the caller's stays as it is."""
    if config is None:
        return True
    short = copy.deepcopy(config)
    try:
        if getattr(config, "num_hidden_layers", None) == pattern.num_layers:
            short.num_hidden_layers = pattern.kept
        for name, values in lists.items():
            del values[_cut(pattern)]
            setattr(short, name, values)
    except Exception:  # a config that derives one from the other: its layers are all run
        return False
    for module in model.modules():
        if vars(module).get("config") is config:
            module.config = short  # type: ignore[assignment]
    return True


def _describe(layer: torch.nn.Module) -> str:
    """Everything about a layer but its number."""
    parameters = [(name, tuple(one.shape), one.dtype, one.requires_grad) for name, one in layer.named_parameters()]
    words = [
        (name, value)
        for module in layer.modules()
        for name, value in vars(module).items()
        if isinstance(value, (str, float, bool)) and name[0] != "_"
    ]
    return f"{layer!r} {parameters} {words}"


def unfold(
    events: Sequence[Event], storages: Mapping[int, Storage], pattern: Pattern
) -> tuple[list[Piece], dict[int, Storage]] | None:
    """Return the stream of the whole model from that of four repeats; None if the inner repeats differ.

    Storages of repeats that were left out are those of the repeat that stands for them, under numbers of their own.
    """
    unit_of = {layer: pattern.unit_of(layer) if layer >= 0 else -1 for layer in {event.layer for event in events}}
    owners = {key: pattern.unit_of(storage.layer) for key, storage in storages.items()}
    labelled = [
        tuple.__new__(Event, (key, num_bytes, phase, unit_of[layer])) for key, num_bytes, phase, layer in events
    ]
    units = _order_frees(_free_graph(labelled, owners), owners)
    runs = _split(units, owners)
    if not _number_sweeps(runs, pattern.middle):
        return None
    places = _list_places(runs)
    for index, run in enumerate(runs):
        if run.unit == pattern.middle and not _inner_repeat(runs, index, places):
            return None
    pieces = _emit(runs, places, pattern)
    return None if _leaks(pieces) and not _leaks([Piece(events)]) else (pieces, Repeated(storages))


def _leaks(pieces: Sequence[Piece]) -> bool:
    """Whether a step leaves more behind than the one before: in a stream unfolded right, only what the model leaves."""
    left = [sum(piece.num_bytes * len(piece.repeats) for piece in step) for step in split_steps(pieces)]
    return any(left[1:-1])


def _free_graph(events: list[Event], owners: Mapping[int, int]) -> list[Event]:
    """Return the stream with what a dying graph lets go of in the unit it came from, not in the one that ran last.

    What an autograd function hangs on its context, rather than saving it for backward, lives as long as the graph.
    """
    first = 0
    for index in range(1, len(events) + 1):
        if index < len(events) and events[index].num_bytes < 0 and events[index].layer == events[first].layer:
            continue
        stretch = events[first:index]
        if any(one.num_bytes < 0 and one.layer >= 0 and owners[one.key] > one.layer + 1 for one in stretch):
            events[first:index] = [one._replace(layer=-1) if one.num_bytes < 0 else one for one in stretch]
        first = index
    return events


def _order_frees(events: Sequence[Event], owners: Mapping[int, int]) -> list[Event]:
    """Return the stream with frees that follow one another outside of layers in order of units.

    Hash maps give up their tensors in any order (autocast's cache), and no order of frees changes what is free after.
    """
    ordered: list[Event] = []
    frees: list[Event] = []
    for event in events:
        if event.num_bytes < 0 and event.layer < 0:
            frees.append(event)
            continue
        ordered += sorted(frees, key=lambda one: (owners[one.key], one.key))
        frees = []
        ordered.append(event)
    return ordered + sorted(frees, key=lambda one: (owners[one.key], one.key))


def _split(events: Sequence[Event], owners: Mapping[int, int]) -> list[_Run]:
    """A loop over tensors drops what it made for a unit when it has made the first of the next: that is the next's."""
    runs: list[_Run] = []
    for event in events:
        unit = event.layer
        if unit < 0 and event.key >= 0:
            unit = owners[event.key]
            made = bool(runs) and any(one.num_bytes > 0 for one in runs[-1].events)
            if event.num_bytes < 0 and made and unit == runs[-1].unit - 1:
                unit += 1
        if not runs or runs[-1].unit != unit or not event.num_bytes:
            runs.append(_Run(unit, []))
        runs[-1].events.append(event)
    return runs


def _number_sweeps(runs: list[_Run], middle: int) -> bool:
    """Number passes over the units, in either direction; False where a middle unit stands alone."""
    for index, run in enumerate(runs):
        if run.unit != middle:
            continue
        if index == 0 or index + 1 >= len(runs):
            return False
        step = runs[index + 1].unit - middle
        if abs(step) != 1 or runs[index - 1].unit != middle - step:
            return False
        for direction in (1, -1):
            at = index
            while 0 <= at < len(runs) and runs[at].unit == middle + step * (at - index) and runs[at].unit >= 0:
                runs[at].sweep = index
                at += direction
    for index, run in enumerate(runs):
        if run.sweep < 0:
            run.sweep = index
    return True


def _list_places(runs: list[_Run]) -> dict[int, Place]:
    places: dict[int, Place] = {}
    for run in runs:
        ordinal = 0
        for event in run.events:
            if event.num_bytes > 0:
                places[event.key] = Place(run.sweep, run.unit, ordinal)
                ordinal += 1
    return places


def _inner_repeat(runs: list[_Run], index: int, places: Mapping[int, Place]) -> bool:
    """Whether the middle unit did what the inner unit beside it did."""
    beside = index + (runs[index + 1].unit - runs[index].unit)
    middle, other = (list(_describe_run(runs[at], places)) for at in (index, beside))
    return middle == other and all(abs(one[3]) <= 1 for one in middle)


def _describe_run(run: _Run, places: Mapping[int, Place]) -> Iterator[tuple[Any, ...]]:
    """Yield the events of a run as seen from its unit: storages of other units by distance."""
    for event in run.events:
        place = places[event.key]
        yield event.num_bytes, event.phase, (place.sweep, place.ordinal), place.unit - run.unit


class Repeated(dict[int, Storage]):
    """What the numbers of a stream stand for; those of repeats left out are described by the middle's own."""

    def __missing__(self, key: int) -> Storage:
        return self[key % STRIDE]


def _emit(runs: list[_Run], places: Mapping[int, Place], pattern: Pattern) -> list[Piece]:
    """Write the runs down, the middle one once for itself and once for the repeats that were left out.

    A storage's number is that of the run it stands in, plus a stride for each repeat its unit lies behind the middle.
    """
    middle = pattern.middle
    twins = {place: key for key, place in places.items() if place.unit == middle}
    pieces: list[Piece] = []
    alone: list[Event] = []
    for index, run in enumerate(runs):
        if run.unit != middle:
            alone += [_shifted(event, places, run.unit, pattern) for event in run.events]
            continue
        seen = [_seen_from_middle(event, places, middle, twins) for event in run.events]
        near, far = (_end(run.events, seen, repeat, pattern) for repeat in (0, pattern.missing))
        inner = range(1, pattern.missing)
        if runs[index + 1].unit < middle:
            near, far, inner = far, near, inner[::-1]
        alone += near
        if inner:
            pieces += Piece(alone), repeat_events(seen, inner)
            alone = []
        alone += far
    return [*pieces, Piece(alone)]


def _seen_from_middle(event: Event, places: Mapping[int, Place], middle: int, twins: Mapping[Place, int]) -> Event:
    """Return an event of the middle unit with a number that any repeat's own is a stride for each repeat off.

    That is the number of the middle's own storage in that place, a stride off for each unit of distance.
    """
    place = places[event.key]
    number = twins[place._replace(unit=middle)] + (place.unit - middle) * STRIDE
    return Event(number, event.num_bytes, event.phase, middle if event.layer >= 0 else -1)


def _end(events: Sequence[Event], seen: Sequence[Event], repeat: int, pattern: Pattern) -> list[Event]:
    """Return the middle unit's events as the first or last of the repeats has them: neighbours at the ends are real."""
    made = []
    for event, (number, num_bytes, phase, layer) in zip(events, seen, strict=True):
        number += repeat * STRIDE
        inside = 0 <= number < (pattern.missing + 1) * STRIDE
        made.append(Event(number if inside else event.key, num_bytes, phase, layer + repeat if layer >= 0 else -1))
    return made


def _shifted(event: Event, places: Mapping[int, Place], unit: int, pattern: Pattern) -> Event:
    """Return an event outside the middle: what it touches of the middle is of the repeat nearest to it."""
    layer = event.layer + pattern.missing if event.layer > pattern.middle else event.layer
    if event.key >= 0 and places[event.key].unit == pattern.middle and unit > pattern.middle:
        return Event(event.key + pattern.missing * STRIDE, event.num_bytes, event.phase, layer)
    return event._replace(layer=layer)

"""Layers repeat: a step of five layers, unfolded into the step of as many as the model has.

Memory is a stream of allocations and frees. Where identical layers run one after another, the stream repeats itself
with other storages; the stream of the middle layer is repeated in place of the layers that were left out. Whether the
three middle layers really did the same is checked, event by event.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from brim.probes.model import find_layers
from brim.probes.tracker import Event, Storage

FOLDED_DEPTH = 5
_MIDDLE = 2


class Place(NamedTuple):
    """Where a storage was made: which sweep over the layers, which layer, and how many storages before it."""

    sweep: int
    layer: int
    ordinal: int


@dataclass(slots=True)
class _Run:
    """Consecutive events of one layer, or of none (-1)."""

    layer: int
    events: list[Event]
    sweep: int = -1


def fold_layers(model: torch.nn.Module) -> int:
    """Cut the repeated layers down to five if they are all alike, and return how many there were; 0 if nothing is cut.

    A model whose config lists kinds of layers is left alone unless all are of one kind.
    """
    layers = find_layers(model)
    if layers is None or len(layers) <= FOLDED_DEPTH or len({_describe(layer) for layer in layers}) != 1:
        return 0
    depth, config = len(layers), getattr(model, "config", None)
    if len(set(getattr(config, "layer_types", None) or ["same"])) != 1:
        return 0
    if config is not None and getattr(config, "num_hidden_layers", None) != depth:
        return 0
    del layers[FOLDED_DEPTH:]
    if config is not None:
        _tell_depth(model, config)
    return depth


def _tell_depth(model: torch.nn.Module, config: Any) -> None:
    """Give every module that holds the config a copy with the new depth: the caller's own stays as it is."""
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = FOLDED_DEPTH
    for module in model.modules():
        if vars(module).get("config") is config:
            module.config = shallow  # type: ignore[assignment]


def _describe(layer: torch.nn.Module) -> str:
    """Everything about a layer but its number."""
    parameters = [(name, tuple(one.shape), one.dtype, one.requires_grad) for name, one in layer.named_parameters()]
    words = {
        name: value for name, value in vars(layer).items() if isinstance(value, (str, float, bool)) and name[0] != "_"
    }
    return f"{layer!r} {parameters} {words}"


def unfold(
    events: Sequence[Event], storages: Mapping[int, Storage], depth: int
) -> tuple[list[Event], dict[int, Storage]] | None:
    """Return the stream of a model with `depth` layers from that of five; None if the middle layers differ."""
    runs = _split(_order_frees(events, storages), storages)
    if not _number_sweeps(runs):
        return None
    places = _list_places(runs)
    for index, run in enumerate(runs):
        if run.layer == _MIDDLE and not _middle_repeats(runs, index, places):
            return None
    return _emit(runs, places, storages, depth)


def _order_frees(events: Sequence[Event], storages: Mapping[int, Storage]) -> list[Event]:
    """Return the stream with frees that follow one another outside of layers in order of layers.

    Hash maps give up their tensors in any order (autocast's cache), and no order of frees changes what is free after.
    """
    ordered: list[Event] = []
    frees: list[Event] = []
    for event in events:
        if event.num_bytes < 0 and event.layer < 0:
            frees.append(event)
            continue
        ordered += sorted(frees, key=lambda one: (storages[one.key].layer, one.key))
        frees = []
        ordered.append(event)
    return ordered + sorted(frees, key=lambda one: (storages[one.key].layer, one.key))


def _split(events: Sequence[Event], storages: Mapping[int, Storage]) -> list[_Run]:
    """A loop over tensors drops what it made for a layer when it has made the first of the next: that is the next's."""
    runs: list[_Run] = []
    for event in events:
        layer = event.layer
        if layer < 0 and event.key >= 0:
            layer = storages[event.key].layer
            last = runs[-1].events[-1] if runs else event
            if event.num_bytes < 0 < last.num_bytes and layer == runs[-1].layer - 1:
                layer += 1
        if not runs or runs[-1].layer != layer or not event.num_bytes:
            runs.append(_Run(layer, []))
        runs[-1].events.append(event)
    return runs


def _number_sweeps(runs: list[_Run]) -> bool:
    """Number passes over the layers, in either direction; False where a middle layer stands alone."""
    for index, run in enumerate(runs):
        if run.layer != _MIDDLE:
            continue
        if index == 0 or index + 1 >= len(runs):
            return False
        step = runs[index + 1].layer - _MIDDLE
        if abs(step) != 1 or runs[index - 1].layer != _MIDDLE - step:
            return False
        for offset in range(-_MIDDLE, _MIDDLE + 1):
            at = index + offset
            if 0 <= at < len(runs) and runs[at].layer == _MIDDLE + step * offset:
                runs[at].sweep = index
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
                places[event.key] = Place(run.sweep, run.layer, ordinal)
                ordinal += 1
    return places


def _middle_repeats(runs: list[_Run], index: int, places: Mapping[int, Place]) -> bool:
    before, middle, after = (list(_describe_run(runs[at], places)) for at in (index - 1, index, index + 1))
    return before == middle == after and all(abs(one[3]) <= 1 for one in middle)


def _describe_run(run: _Run, places: Mapping[int, Place]) -> Iterator[tuple[Any, ...]]:
    """Yield the events of a run as seen from its layer: storages of other layers by distance."""
    for event in run.events:
        place = places[event.key]
        if place.layer < 0:
            yield event.num_bytes, event.phase, place, 0
        else:
            yield event.num_bytes, event.phase, (place.sweep, place.ordinal), place.layer - run.layer


def _emit(
    runs: list[_Run], places: Mapping[int, Place], storages: Mapping[int, Storage], depth: int
) -> tuple[list[Event], dict[int, Storage]]:
    made: list[Event] = []
    named: dict[Place, int] = {}
    described: dict[int, Storage] = {}
    for index, run in enumerate(runs):
        for layer in _new_layers(runs, index, depth):
            for event in run.events:
                if event.key < 0:
                    made.append(event)
                    continue
                place = places[event.key]
                new = place._replace(layer=_new_layer(place.layer, run.layer, layer, depth))
                if event.num_bytes > 0:
                    named[new] = len(described)
                    described[len(described)] = replace(storages[event.key], layer=new.layer)
                made.append(Event(named[new], event.num_bytes, event.phase, layer))
    return made, described


def _new_layers(runs: list[_Run], index: int, depth: int) -> Iterator[int]:
    """Yield the layers a run stands for, in the direction of its sweep."""
    layer = runs[index].layer
    if layer != _MIDDLE:
        yield layer if layer < _MIDDLE else depth - FOLDED_DEPTH + layer
        return
    middle = range(_MIDDLE, depth - _MIDDLE)
    yield from middle if runs[index + 1].layer > _MIDDLE else reversed(middle)


def _new_layer(owner: int, run_layer: int, new_layer: int, depth: int) -> int:
    """Return which layer of the deep model owns a storage that a run of the shallow one touches."""
    if owner < 0:
        return owner
    if run_layer == _MIDDLE:
        return new_layer + owner - run_layer
    if owner == _MIDDLE:
        return _MIDDLE if run_layer < _MIDDLE else depth - _MIDDLE - 1
    return owner if owner < _MIDDLE else depth - FOLDED_DEPTH + owner

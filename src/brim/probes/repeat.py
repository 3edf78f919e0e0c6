"""Steps repeat: the micro-batches of the second optimizer step allocate what those of the first did, with other names.

Only the optimizer's states tell the two apart, and no forward or backward pass asks for them. So the stream of the
first is written down again, and its gradients are put in place for the optimizer, instead of running it all again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from brim.probes.pieces import Event
from brim.probes.tracker import StorageTracker


class Gradient(NamedTuple):
    """The gradient of a parameter when the micro-batches are done."""

    parameter: torch.nn.Parameter
    key: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Stretch:
    """The micro-batches of an optimizer step in the tracker's stream."""

    first: int
    """Number of their first event."""
    last: int
    """Number of the event after the last."""
    parts: dict[int, str]
    """Phase of the step that begins at an event, by its own name in the first step too."""
    gradients: tuple[Gradient, ...]
    """What they leave for the optimizer."""
    releases: dict[int, int]
    """Storages that the loop holds until it has new ones of their kind, and the event at which it lets the old go."""


def take_stretch(
    tracker: StorageTracker, first: int, parts: dict[int, str], optimizer: torch.optim.Optimizer,
    releases: dict[int, int],
) -> Stretch | None:  # fmt: skip
    """Return the stretch that began at an event and ends here; None if its gradients share storages."""
    gradients = []
    for parameter in (one for group in optimizer.param_groups for one in group["params"] if one.grad is not None):
        gradient = parameter.grad
        keys = tracker.keys_of([gradient])
        if len(keys) != 1 or gradient.numel() * gradient.element_size() != gradient.untyped_storage().nbytes():
            return None
        gradients.append(Gradient(parameter, keys[0], gradient.size(), gradient.stride(), gradient.dtype))
    if len({one.key for one in gradients}) < len(gradients):
        return None
    return Stretch(first, len(tracker.events), parts, tuple(gradients), releases)


def can_repeat(tracker: StorageTracker, stretch: Stretch) -> bool:
    """Whether a stretch frees its own only, and what outlives it is its gradients and what the loop still holds."""
    made, freed = _made_and_freed(tracker.events[stretch.first : stretch.last])
    return freed <= made and _kept(stretch, made - freed) <= tracker.live_keys


def repeat_stretch(tracker: StorageTracker, stretch: Stretch, begin) -> None:  # type: ignore[no-untyped-def]
    """Write the stretch down again and put its gradients in place.

    Args:
        tracker: what follows the storages.
        stretch: the micro-batches of the first step.
        begin: names the next phase of the step.
    """
    events = tracker.events[stretch.first : stretch.last]
    made, freed = _made_and_freed(events)
    once = _kept(stretch, made - freed) - set(stretch.releases)
    names: dict[int, int] = {}
    for number, event in enumerate(events, stretch.first):
        for key in (key for key, at in stretch.releases.items() if at == number):
            tracker.release(key)
        if not event.num_bytes:
            begin(stretch.parts[number])
        elif event.key not in once:
            tracker.copy(event, names)
    for key in stretch.releases:
        tracker.rename(key, names[key])
    for one in stretch.gradients:
        with tracker.muted():
            one.parameter.grad = torch.empty_strided(one.size, one.stride, dtype=one.dtype)
        tracker.adopt(one.parameter.grad, names[one.key])


def _made_and_freed(events: Sequence[Event]) -> tuple[set[int], set[int]]:
    made = {event.key for event in events if event.num_bytes > 0}
    return made, {event.key for event in events if event.num_bytes < 0}


def _kept(stretch: Stretch, lasting: set[int]) -> set[int]:
    """Return what the loop holds on to: its micro-batches, the last loss, what is made once."""
    return lasting - {one.key for one in stretch.gradients}

"""What a real step tells instead of its storages: the seconds of every optimizer step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from brim.devices.meter import Meter
from brim.probes.phases import END_OF_STEP


class Untracked:
    """Answers to the names of the tracker of storages, and follows none."""

    follows = False
    """Whether storages are followed, for which modules tell that they run and the card is imitated."""

    def __init__(self) -> None:
        """Start with nothing, and stay so."""
        self.modules: list[str] = []
        self.notes: list[str] = []
        self.events: list[None] = []
        self.next_key, self.layer = 0, -1

    def begin(self, phase: str) -> None:
        """Hear the name of what comes next."""

    def keys_of(self, tensors: Iterable[Any]) -> list[int]:
        """Return no keys: storages are not told apart."""
        return []

    def name_of(self, tensor: Any) -> str:
        """Return no name."""
        return ""

    def layer_of(self, tensor: Any) -> int:
        """Return no layer."""
        return -1

    def ignore(self, *args: Any) -> None:
        """Take a label, a name or a place of storages, and do nothing with it."""

    label = label_live = call = tag = move_to_host = ignore


class Clock(Untracked):
    """Times the steps."""

    def __init__(self, meter: Meter) -> None:
        """Start with no step."""
        super().__init__()
        self.seconds: list[float] = []
        self._meter, self._since = meter, time.perf_counter()

    def start(self) -> None:
        """Begin the next step now, and forget those before."""
        self.seconds.clear()
        self._meter.wait()
        self._since = time.perf_counter()

    def begin(self, phase: str) -> None:
        """Note the end of a step."""
        if phase != END_OF_STEP:
            return
        self._meter.wait()
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now

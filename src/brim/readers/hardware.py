"""From what the user calls the hardware to a cluster: a card, a size in bytes, or what is in this machine."""

from __future__ import annotations

import re
from dataclasses import replace

from brim.errors import InvalidInput, InvalidSize, UnknownName, quoted
from brim.readers.nvml import LiveDevice, read_live_devices
from brim.spec.device import Cluster, Device, hold_cpu
from brim.tables.read import find_device, match_device
from brim.units import MIB, format_size, parse_size

_MOST_DEVICES = 1024
_CPU = "cpu:"
_ZERO = re.compile(r"(0+\.?0*|\.0+)\s*([kmgt]i?)?b?", re.IGNORECASE)
_UNNOTICED_BYTES = 64 * MIB
"""Less than this in use is not worth a word: an idle driver holds a few MiB."""


def read_cluster(text: str, *, num_nodes: int = 1) -> tuple[Cluster, str]:
    """Return the devices a text means, and one sentence that says what was understood.

    Args:
        text: a GPU (`rtx-4090`, `RTX 4090`), a size (`24GiB`), each with a count per node behind a colon
            (`h100:8`); `auto`, the GPUs of this machine with the memory that is free now; or `cpu:2GiB`, a CPU that
            is held to a size, which trials run on where there is no GPU.
        num_nodes: nodes with these devices.

    Raises:
        UnknownName: no such GPU. InvalidInput: an impossible count, or `auto` finds no GPU.
        MissingExtra: `auto` without nvidia-ml-py and torch.
    """
    _refuse_count("nodes", num_nodes)
    if text.strip().lower().startswith(_CPU):
        return _read_cpu(text.strip()[len(_CPU) :])
    name, count = _split(text)
    if name.lower() == "auto":
        cluster, sentence = _read_auto(count)
    else:
        device, about = _read_device(name)
        cluster, sentence = Cluster(device=device, devices_per_node=count or 1), f"{_times(count or 1)}{about}"
    if num_nodes > 1:
        return replace(cluster, num_nodes=num_nodes), f"{sentence}, on each of {num_nodes} nodes"
    return cluster, sentence


def _read_cpu(size: str) -> tuple[Cluster, str]:
    size_bytes = parse_size(size)
    device = hold_cpu(size_bytes, "the size the user gave")
    return Cluster(device=device), f"a CPU held to {format_size(size_bytes)} (speed unknown)"


def _split(text: str) -> tuple[str, int | None]:
    name, colon, count = text.strip().rpartition(":")
    if not colon:
        return text.strip(), None
    if not (count.strip().isascii() and count.strip().isdecimal() and len(count) <= 9):
        raise InvalidInput(f"{quoted(text)}: {quoted(count)} is no number of GPUs; write for example h100:8", gpu=text)
    _refuse_count("GPUs", int(count))
    return name.strip(), int(count)


def _refuse_count(what: str, count: int) -> None:
    if not 1 <= count <= _MOST_DEVICES:
        raise InvalidInput(f"{count} {what} cannot be planned; give 1 to {_MOST_DEVICES}", count=count)


def _times(count: int) -> str:
    return f"{count} x " if count > 1 else ""


def _read_device(name: str) -> tuple[Device, str]:
    try:
        device = find_device(name)
    except UnknownName as unknown:
        return _read_size(name, unknown)
    return device, f"{device.name}, {format_size(device.capacity_bytes)}"


def _read_size(name: str, unknown: UnknownName) -> tuple[Device, str]:
    # A bare number is far more often a card's than a number of bytes.
    if not name[:1].isdigit() or name.isdigit():
        raise unknown
    try:
        size_bytes = parse_size(name)
    except InvalidSize:
        if _ZERO.fullmatch(name):
            raise InvalidInput(f"the size of the GPU is zero: {quoted(name)}; write for example 24GiB") from None
        raise unknown from None
    device = Device(name=name, capacity_bytes=size_bytes, source="the size the user gave")
    return device, f"any GPU with {format_size(size_bytes)} (speed unknown)"


def _read_auto(count: int | None) -> tuple[Cluster, str]:
    live, teller = read_live_devices()
    if count is not None and count > len(live):
        raise InvalidInput(f"auto:{count} asks for {count} GPUs; {len(live)} visible", gpu="auto", visible=len(live))
    chosen = live[:count]  # a job started on fewer devices takes the first ones
    device, weakest = min(((_described(one), one) for one in chosen), key=lambda pair: pair[0].plannable_bytes)
    names = list(dict.fromkeys(one.name for one in chosen))
    parts = [f"{_times(len(chosen))}{names[0]} ({teller})", _memory_words(device, weakest)]
    if len(names) > 1:
        parts[0] = f"{' and '.join(names)} ({teller}), all planned as the weakest, {weakest.name}"
    if device.memory_bytes_per_second is None:
        parts.append("no speed estimate: the GPU table does not know this device")
    return Cluster(device=device, devices_per_node=len(chosen)), "; ".join(parts)


def _described(live: LiveDevice) -> Device:
    row = None if live.is_slice else match_device(live.name, live.capability, live.total_bytes)
    if row is None:
        return Device(
            name=live.name, capacity_bytes=live.total_bytes, free_bytes=live.free_bytes, vendor=live.vendor,
            compute_capability=live.capability, source="the driver of this machine",
        )  # fmt: skip
    return replace(row, capacity_bytes=live.total_bytes, free_bytes=min(live.free_bytes, live.total_bytes))


def _memory_words(device: Device, live: LiveDevice) -> str:
    taken_bytes = live.total_bytes - live.free_bytes
    if taken_bytes < _UNNOTICED_BYTES:
        return f"{format_size(live.free_bytes)} free"
    return (
        f"{format_size(live.free_bytes)} free of {format_size(live.total_bytes)}: "
        f"{format_size(taken_bytes)} is taken by other programs now"
    )

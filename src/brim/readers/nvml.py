"""The GPUs of this machine as their driver describes them now; all that touches NVML or torch for it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from brim.errors import InvalidInput, MissingExtra, quoted

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveDevice:
    """A GPU, or one instance of a partitioned GPU, as its driver describes it now."""

    name: str
    """The driver's name."""
    total_bytes: int
    """Memory programs can share, bytes."""
    free_bytes: int
    """Memory no program holds, bytes."""
    capability: tuple[int, int] | None
    """CUDA compute capability; None if unknown."""
    is_slice: bool = False
    """Whether this is an instance of a partitioned GPU, which has a share of its rates only."""
    vendor: str = "nvidia"
    """`nvidia` or `amd`."""


def read_live_devices() -> tuple[tuple[LiveDevice, ...], str]:
    """Return the GPUs a program started now would see, and who described them (`NVML` or `torch`).

    CUDA_VISIBLE_DEVICES is honoured. NVML is asked first: it costs milliseconds and takes no memory.

    Raises:
        MissingExtra: neither nvidia-ml-py nor torch is installed.
        InvalidInput: there is no GPU, or none is visible.
    """
    try:
        import pynvml
    except ImportError:
        return _read_torch(), "torch"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if importlib.util.find_spec("torch") is not None:
            return _read_torch(), "torch"  # an AMD card, where NVML is installed but has no driver
        raise _none_found(f"NVML says: {error}") from None
    try:
        return _read_nvml(pynvml), "NVML"
    except pynvml.NVMLError as error:
        raise _none_found(f"NVML says: {error}") from None
    finally:
        pynvml.nvmlShutdown()


def _none_found(reason: str) -> InvalidInput:
    return InvalidInput(f"no GPU to plan for: {reason}; name one (`brim gpus`) or a size such as 24GiB", gpu="auto")


def _read_nvml(nvml: Any) -> tuple[LiveDevice, ...]:
    count = nvml.nvmlDeviceGetCount()
    whole = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    wanted = os.environ.get(_VISIBLE)
    if wanted is None:
        handles = [(handle, slices) for handle in whole if (slices := _slices(nvml, handle)) is not None]
    else:
        handles = _visible(nvml, whole, wanted)
    found: list[LiveDevice] = []
    for handle, slices in handles:
        if slices:  # CUDA shows a program the first instance only
            return (_live(nvml, slices[0], parent=handle),)
        found.append(_live(nvml, handle))
    if not found:
        raise _none_found("the driver has none" if wanted is None else f"{_VISIBLE}={quoted(wanted)} hides all {count}")
    return tuple(found)


def _visible(nvml: Any, whole: Sequence[Any], wanted: str) -> list[tuple[Any, list[Any]]]:
    """Return the handles CUDA_VISIBLE_DEVICES names; like CUDA, stop at the first entry that means none.

    Source: CUDA C++ Programming Guide, section "CUDA Environment Variables".
    """
    chosen: list[tuple[Any, list[Any]]] = []
    for entry in (part.strip() for part in wanted.split(",")):
        found = _entry(nvml, whole, entry)
        if found is None:
            break
        chosen.append(found)
    return chosen


def _entry(nvml: Any, whole: Sequence[Any], entry: str) -> tuple[Any, list[Any]] | None:
    if entry.isdecimal():
        return (whole[int(entry)], _slices(nvml, whole[int(entry)]) or []) if int(entry) < len(whole) else None
    for handle in whole:
        slices = _slices(nvml, handle) or []
        if entry.startswith("GPU-") and _uuid(nvml, handle).startswith(entry):
            return handle, slices
        named = [part for part in slices if entry.startswith("MIG-") and _uuid(nvml, part).startswith(entry)]
        if named:
            return handle, named
    return None


def _uuid(nvml: Any, handle: Any) -> str:
    return _text(nvml.nvmlDeviceGetUUID(handle))


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _slices(nvml: Any, handle: Any) -> list[Any] | None:
    """Return the instances of a partitioned GPU; [] if it is whole, None if it is partitioned without any."""
    try:
        if nvml.nvmlDeviceGetMigMode(handle)[0] != 1:
            return []
        most = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except nvml.NVMLError:  # cards that cannot be partitioned say "not supported"
        return []
    slices = []
    for index in range(most):
        try:
            slices.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
        except nvml.NVMLError:  # a place without an instance
            continue
    return slices or None


def _live(nvml: Any, handle: Any, parent: Any = None) -> LiveDevice:
    memory = _memory(nvml, handle)
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle if parent is None else parent)
    except nvml.NVMLError:
        capability = None
    else:
        capability = (major, minor)
    return LiveDevice(
        name=_text(nvml.nvmlDeviceGetName(handle)), free_bytes=int(memory.free), capability=capability,
        total_bytes=int(memory.total) - int(getattr(memory, "reserved", 0)), is_slice=parent is not None,
    )  # fmt: skip


def _memory(nvml: Any, handle: Any) -> Any:
    # The second version tells what the driver keeps for itself apart from what programs hold.
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (nvml.NVMLError, AttributeError, TypeError):
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def _read_torch() -> tuple[LiveDevice, ...]:
    try:
        import torch
    except ImportError:
        raise MissingExtra(package="nvidia-ml-py", extra="gpu", purpose="`auto` (or name a GPU: `brim gpus`)") from None
    if not torch.cuda.is_available():
        raise _none_found("torch sees none")
    return tuple(_live_torch(torch, index) for index in range(torch.cuda.device_count()))


def _live_torch(torch: Any, index: int) -> LiveDevice:
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    amd = getattr(torch.version, "hip", None) is not None
    return LiveDevice(
        name=torch.cuda.get_device_name(index), total_bytes=total_bytes, free_bytes=free_bytes,
        capability=None if amd else tuple(torch.cuda.get_device_capability(index)), vendor="amd" if amd else "nvidia",
    )  # fmt: skip

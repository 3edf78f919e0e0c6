"""What the job runs on: devices, the links between them, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass

from brim.spec.model import STRICT

BLOCK_BYTES = 512
"""The CUDA caching allocator hands out multiples of this. Source: c10/cuda/CUDACachingAllocator.cpp kMinBlockSize."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How two devices talk."""

    __pydantic_config__ = STRICT

    name: str
    """Key of the links table, for example `nvlink4`."""
    bytes_per_second: float
    """Achieved bandwidth in one direction, bytes per second."""
    latency_seconds: float
    """Time of an empty message, seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator as its driver and its data sheet describe it."""

    __pydantic_config__ = STRICT

    name: str
    """Canonical name of the GPU table, or the size the user gave (`24GiB`)."""
    capacity_bytes: int
    """Memory one process can get, as the driver reports it, bytes."""
    free_bytes: int | None = None
    """Memory free now, bytes; None when the card is not in this machine."""
    memory_bytes_per_second: float | None = None
    """Memory bandwidth, bytes per second."""
    fp32_flops_per_second: float | None = None
    """Dense fp32 rate, FLOP per second."""
    tf32_flops_per_second: float | None = None
    """Dense tensor-core tf32 rate, FLOP per second."""
    fp16_flops_per_second: float | None = None
    """Dense tensor-core fp16 rate with fp32 accumulation, FLOP per second."""
    bf16_flops_per_second: float | None = None
    """Dense tensor-core bf16 rate, FLOP per second; None without native support."""
    fp8_flops_per_second: float | None = None
    """Dense tensor-core fp8 rate, FLOP per second; None without support."""
    matmul_fraction: float | None = None
    """Share of the dense rate that large matrix products reach, measured; None if unknown."""
    compute_capability: tuple[int, int] | None = None
    """CUDA compute capability (major, minor); None for other vendors."""
    vendor: str = "nvidia"
    """`nvidia`, `amd`, or `cpu` for a CPU that is held to a size."""
    link: str | None = None
    """Fastest link between two such devices, key of the links table."""
    source: str = ""
    """Where these figures stand."""

    @property
    def plannable_bytes(self) -> int:
        """Bytes this job could take now: what is free if known, else the capacity."""
        return self.capacity_bytes if self.free_bytes is None else self.free_bytes


def hold_cpu(capacity_bytes: int, source: str = "") -> Device:
    """Return a CPU held to a size, which stands in for a card: it has neither context nor library workspaces.

    Args:
        capacity_bytes: what it may hold, bytes.
        source: where that figure is from.
    """
    return Device(name="cpu", capacity_bytes=capacity_bytes, vendor="cpu", source=source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Devices of one kind: `devices_per_node` on each of `num_nodes` nodes."""

    __pydantic_config__ = STRICT

    device: Device
    """The weakest device; all are planned as this one."""
    devices_per_node: int = 1
    """Devices in each node."""
    num_nodes: int = 1
    """Nodes."""

    @property
    def num_devices(self) -> int:
        """Devices over all nodes."""
        return self.devices_per_node * self.num_nodes

"""Time of collectives between the devices of one node: ring laws over the links table."""

from __future__ import annotations

from brim.spec.device import Cluster, Device
from brim.tables.read import find_link

_LAUNCH_SECONDS = 8.4e-6
"""Fixed cost of a collective. Source: NCCL ring, Simple protocol, as in torch 2.13 _inductor/comm_analysis.py."""
FIRST_BUCKET_BYTES = 25 * 2**20
"""What DistributedDataParallel sends last, with nothing left to hide it. Source: torch/nn/parallel/distributed.py."""


def gather_seconds(size_bytes: float, ranks: int, cluster: Cluster) -> float | None:
    """Return the time of an all-gather or reduce-scatter of `size_bytes` over all ranks; None for an unknown link.

    Source: ring law (n - 1) a + (n - 1) / n S / B with the bus bandwidth of tables/links.toml (facts/scale.md 3.3).
    Leaves out: more than one node (the cluster does not say what joins them), NVSwitch reductions (up to twice faster).
    """
    if ranks == 1:
        return 0.0
    if cluster.num_nodes > 1 or cluster.device.link is None:
        return None
    link = find_link(cluster.device.link)
    return _LAUNCH_SECONDS + (ranks - 1) * (link.latency_seconds + size_bytes / ranks / link.bytes_per_second)


def host_bytes_per_second(device: Device) -> float:
    """Return what a card moves to and from host memory in one direction, bytes per second.

    Source: PCIe generation by card: the table's link where it is PCIe, else 5 from Hopper on, 4 for Ampere and Ada, 3
    before; achieved rates of tables/links.toml.
    """
    if device.link is not None and device.link.startswith("pcie"):
        return find_link(device.link).bytes_per_second
    major = device.compute_capability[0] if device.compute_capability else 8
    return find_link("pcie5" if major >= 9 else "pcie4" if major == 8 else "pcie3").bytes_per_second

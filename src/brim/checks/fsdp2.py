"""Accelerate's FSDP2 on the CPU: its own code, which it runs by itself on accelerators only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def sharding_on_cpu(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """While entered, an accelerator on several CPU ranks shards what it prepares by FSDP2, layer by layer.

    Accelerate leaves an FSDP plugin aside where ranks run on the CPU and replicates instead, without a word. Told that
    it shards, it does so with the same code as on GPUs. Source: accelerate/state.py, `AcceleratorState.__init__`, where
    `MULTI_CPU` is not among the kinds that become `FSDP`.
    """
    from accelerate.utils import DistributedType

    state = accelerator.state
    before = state.distributed_type
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, _make_plugin(model)
    try:
        yield
    finally:
        state.distributed_type, state.fsdp_plugin = before, None


def _make_plugin(model: nn.Module) -> Any:
    """Return the plugin that wraps the layers a class names as whole; names of layers it does not have are left out."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    there = {type(module).__name__ for module in model.modules()}
    layers = [name for name in getattr(model, "_no_split_modules", None) or () if name in there]
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap" if layers else "no_wrap",
        transformer_cls_names_to_wrap=layers or None, cpu_ram_efficient_loading=False,
    )  # fmt: skip

"""Accelerate's FSDP2 on the CPU: its own code, which it runs by itself on accelerators only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any

from torch import nn

from brim.errors import ProbeFailed


@contextmanager
def sharding_on_cpu(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """While entered, an accelerator on several CPU ranks shards what it prepares by FSDP2, layer by layer.

    Accelerate leaves an FSDP plugin aside where ranks run on the CPU and replicates instead, without a word. Told that
    it shards, it does so with the same code as on GPUs. Source: accelerate/state.py, `AcceleratorState.__init__`, where
    `MULTI_CPU` is not among the kinds that become `FSDP`.

    Raises:
        ProbeFailed: Accelerate cannot shard the model, on GPUs neither.
    """
    from accelerate.utils import DistributedType

    state, before, kind = accelerator.state, accelerator.state.distributed_type, type(model).__name__
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, _make_plugin(model)
    accelerator.prepare = _telling(accelerator.prepare, kind)
    try:
        yield
    except ValueError as error:  # of parameters that two groups share torch tells in the first forward pass
        if "FSDP group" not in str(error):
            raise
        raise _failed(kind, error) from error
    finally:
        del accelerator.prepare
        state.distributed_type, state.fsdp_plugin = before, None


def _telling(prepare: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """Return `accelerator.prepare`, which says what it cannot do with a class of models."""

    def prepare_or_tell(*args: Any, **kwargs: Any) -> Any:
        try:
            return prepare(*args, **kwargs)
        except Exception as error:
            raise _failed(kind, error) from error

    return prepare_or_tell


def _failed(kind: str, error: Exception) -> ProbeFailed:
    """Return what Accelerate and torch cannot do, as the text of one line; it is no other on GPUs."""
    packages = f"Accelerate {version('accelerate')} with torch {version('torch')}"
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ProbeFailed(f"{packages} cannot shard {kind} by FSDP2: {said}")


def _make_plugin(model: nn.Module) -> Any:
    """Return the plugin that wraps the layers which a class names as whole and has.

    Those around an embedding or a head (BERT's) are left out: Accelerate 1.15 shards embedding and head by themselves
    when layers are sharded already, and torch refuses to shard them again.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin

    apart: set[Any] = set()
    with suppress(NotImplementedError):  # Accelerate asks for them too, and says so itself
        apart = {getattr(model, f"get_{kind}_embeddings", lambda: None)() for kind in ("input", "output")} - {None}
    around = {type(m).__name__ for m in model.modules() if m not in apart and apart & set(m.modules())}
    there = {type(module).__name__ for module in model.modules()} - around
    layers = [name for name in getattr(model, "_no_split_modules", None) or () if name in there]
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap" if layers else "no_wrap",
        transformer_cls_names_to_wrap=layers or None, cpu_ram_efficient_loading=False,
    )  # fmt: skip

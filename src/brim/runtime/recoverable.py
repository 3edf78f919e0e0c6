"""What recovery cannot put back, told before the first step rather than after an out-of-memory."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from brim.runtime.ranks import is_distributed
from brim.runtime.restore import is_sharded, list_sharded

_OF_A_GROUP = ("_all_gather_comm", "_reduce_scatter_comm", "fsdp_params")
"""Parts of FSDP2's group of parameters that recovery asks before, or empties."""
_INSTEAD = "use DDP, or brim.accumulate, which is exact and does not recover"


def explain_unrecoverable(
    model: nn.Module, optimizer: Any = None, scaler: Any = None, group: Any = None
) -> str | None:  # fmt: skip
    """Return why a window of this model cannot be run again, and what would work; None if it can.

    Args:
        model: the module that trains, wrapped or not.
        optimizer: the innermost one; None where none is known yet.
        scaler: a `torch.amp.GradScaler`, if gradients are scaled.
        group: data-parallel process group; the default one if None.
    """
    several = is_distributed() and dist.get_world_size(group) > 1
    found = [*_explain_parameters(model), *_explain_optimizer(optimizer)]
    if is_sharded(model):
        found += _explain_sharded(model, scaler)
    elif isinstance(model, nn.parallel.DistributedDataParallel):
        found += _explain_replicated(model, several, group)
    return next(iter(found), None)


def _explain_parameters(model: nn.Module) -> Iterator[str]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(part, fsdp.FullyShardedDataParallel) for part in model.modules()):
        yield f"FSDP1 keeps gradients in flat parameters of its own: wrap with fully_shard (FSDP2), {_INSTEAD}"
    if type(model).__module__.partition(".")[0] == "deepspeed":
        yield f"DeepSpeed's engine keeps gradients to itself: use FSDP2, {_INSTEAD}"
    if not is_sharded(model) and any(hasattr(one, "device_mesh") for one in model.parameters()):
        yield (
            "parameters are sharded, and the module that was given is not the outermost one of FSDP2: call fully_shard "
            f"on it too and give that one, {_INSTEAD}"
        )
    if any(getattr(one, "_post_accumulate_grad_hooks", None) for one in model.parameters()):
        yield "parameters have hooks that step or move them inside backward: step once, after the whole window"


def _explain_optimizer(optimizer: Any) -> Iterator[str]:
    closure = inspect.signature(optimizer.step).parameters.get("closure") if optimizer is not None else None
    if closure is not None and closure.default is inspect.Parameter.empty:
        yield f"{type(optimizer).__name__} runs the model itself, several times a step: use one without closure"


def _explain_sharded(model: nn.Module, scaler: Any) -> Iterator[str]:
    state = model._get_fsdp_state() if hasattr(model, "_get_fsdp_state") else None
    missing = [] if hasattr(model, "reset_iter_state") else ["FSDPModule.reset_iter_state"]
    if not (hasattr(state, "_fsdp_param_groups") or hasattr(state, "_fsdp_param_group")):
        missing.append("FSDPState._fsdp_param_group")
    else:
        groups = [group for part in model.modules() for group in list_sharded(part)]
        missing += [f"FSDPParamGroup.{name}" for name in _OF_A_GROUP if any(not hasattr(one, name) for one in groups)]
        if not missing and any(getattr(one, "is_dtensor", False) for group in groups for one in group.fsdp_params):
            yield f"tensor parallelism has collectives in the middle of a layer, before which nobody asks: {_INSTEAD}"
    if missing:
        yield (
            f"FSDP2 of torch {torch.__version__} has no {missing[0]}, so a pass that was cut short cannot be put back: "
            f"install torch 2.13 or later, {_INSTEAD}"
        )
    if scaler is not None:
        yield "a GradScaler asks all ranks under FSDP2 where nobody asked before: train in bf16, which needs none"


def _explain_replicated(model: Any, several: bool, group: Any) -> Iterator[str]:
    if model.static_graph:
        yield "DDP(static_graph=True) reduces in the first backward whatever it is told: leave static_graph out"
    if getattr(model, "_comm_hooks", None) or getattr(model, "mixed_precision", None) is not None:
        yield "DDP reduces by a communication hook here, which recovery would bypass: train without the hook"
    if several and dist.get_world_size(model.process_group) != dist.get_world_size(group):
        yield "DDP averages over another process group than the ranks that count: give the same one as group"

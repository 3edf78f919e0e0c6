"""What is recomputed in the backward pass: nothing, all but attention, or whole layers; and what waits on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as checkpoint_function

from brim.cost.attention_kernels import FUSED_OPERATORS
from brim.errors import ProbeFailed
from brim.probes.offload import DeviceBuffers, host_context, offloaded_checkpoint
from brim.spec.recipe import Engine
from brim.spec.strategy import Strategy

_ATTENTION = frozenset(
    packet.default
    for name in FUSED_OPERATORS
    if (packet := getattr(torch.ops.aten, name, None)) is not None
)


def checkpoint(model: torch.nn.Module, strategy: Strategy, engine: Engine) -> None:
    """Switch on the strategy's activation checkpointing, as the trainer does.

    Source: transformers modeling_utils.py _activation_checkpointing_enable; trl models/
    selective_activation_checkpointing.py; unsloth_zoo gradient_checkpointing.py unsloth_checkpoint.

    Raises:
        ProbeFailed: the model has no checkpointing of its own.
    """
    if strategy.activation_checkpointing == "none":
        return
    options = checkpointing_options(strategy, engine)
    _enable(model, options)
    if strategy.activation_offload and not offloads_saved_tensors(engine):
        function = _offloading(engine, options)
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = function


def checkpointing_options(strategy: Strategy, engine: Engine) -> dict[str, Any]:
    """Return the keywords of PyTorch's checkpoint function; saving attention outputs needs the non-reentrant form."""
    if strategy.activation_checkpointing == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
        return {"use_reentrant": False, "context_fn": contexts}
    return {"use_reentrant": engine.reentrant_checkpointing}


def offloads_saved_tensors(engine: Engine) -> bool:
    """Whether offload moves whatever autograd saves (TRL), rather than the inputs of checkpointed layers."""
    return engine.name.lower().startswith("trl")


def spans_layers(strategy: Strategy, engine: Engine) -> bool:
    """Whether what stays of one layer depends on several later ones, so that few layers do not tell what many do."""
    return strategy.activation_offload and offloads_saved_tensors(engine)


def _enable(model: torch.nn.Module, options: dict[str, Any]) -> None:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        name = type(model).__name__
        raise ProbeFailed(f"{name} has no gradient_checkpointing_enable; trace it with activation checkpointing none")
    enable(gradient_checkpointing_kwargs=options)


def _keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Source: trl models/selective_activation_checkpointing.py _build_policy_fn: whatever attention returns is kept."""
    if op in _ATTENTION or "flash_attn" in str(op):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _offloading(engine: Engine, options: dict[str, Any]) -> Callable[..., Any]:
    if engine.name.lower().startswith("unsloth"):
        return functools.partial(offloaded_checkpoint, DeviceBuffers())

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with host_context():
            return checkpoint_function(function, *args, **options, **kwargs)

    return run

"""What a window began with, so that one that failed leaves nothing behind but its data."""

from __future__ import annotations

import gc
import traceback
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

_LARGEST_BUFFER_BYTES = 16 * 2**20
"""Quantised weights are buffers in some libraries; what a forward pass changes (running means, counters) is small."""


class WindowStart:
    """Random state and buffers of a model at the start of each window.

    Buffers are copied in the first window only; after it only those that were seen to change.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._changing: list[Tensor] | None = None
        self._kept: list[tuple[Tensor, Tensor, int]] = []
        self._random: list[Any] = []

    def keep(self) -> None:
        """Note what the window begins with."""
        buffers = _list_small(self._model) if self._changing is None else self._changing
        try:
            self._kept = [(buffer, buffer.detach().clone(), buffer._version) for buffer in buffers]
        except torch.OutOfMemoryError as error:
            release_memory(error)
            self._kept = [(buffer, buffer.detach().to("cpu", copy=True), buffer._version) for buffer in buffers]
        self._random = [torch.get_rng_state()]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._random.append(torch.cuda.get_rng_state())

    def restore(self) -> None:
        """Put it back; copies are kept, since the next attempt may fail as well."""
        torch.set_rng_state(self._random[0])
        if len(self._random) > 1:
            torch.cuda.set_rng_state(self._random[1])
        with torch.no_grad():
            for buffer, kept, _ in self._kept:
                buffer.copy_(kept)

    @property
    def random_state(self) -> Tensor | None:
        """The host's random state at the start; None before the first window."""
        return self._random[0] if self._random else None

    def list_buffers(self) -> dict[int, Tensor]:
        """Return what buffers held at the start, by their id."""
        return {id(buffer): kept for buffer, kept, _ in self._kept}

    def let_go(self) -> None:
        """The window is over: forget the copies, and which buffers never change."""
        if self._changing is None:
            self._changing = [buffer for buffer, _, version in self._kept if buffer._version != version]
        self._kept, self._random = [], []


def _list_small(model: nn.Module) -> list[Tensor]:
    found = [buffer for buffer in model.buffers() if buffer.numel() * buffer.element_size() <= _LARGEST_BUFFER_BYTES]
    return [buffer for buffer in found if not buffer.is_inference()]


def discard_gradients(model: nn.Module) -> None:
    """Drop all gradients, and what FSDP2 holds of a pass that was cut short."""
    for part in model.modules():
        for group in list_sharded(part):
            for sharded in group.fsdp_params:
                sharded.unsharded_accumulated_grad = None
                if hasattr(sharded, "_unsharded_param"):
                    sharded._unsharded_param.grad = None
    reset = getattr(model, "reset_iter_state", None)
    if reset is not None:
        reset()
    model.zero_grad(set_to_none=True)


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 shards the module."""
    return hasattr(model, "set_requires_gradient_sync")


def list_sharded(part: nn.Module) -> list[Any]:
    """Return FSDP2's groups of parameters of one module; none where it does not shard it."""
    if not is_sharded(part):
        return []
    state = part._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [state._fsdp_param_group] if state._fsdp_param_group else []


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, without its graph."""
    to_local = getattr(tensor, "to_local", None)
    return (tensor if to_local is None else to_local()).detach()


def forget_scaling(scaler: Any) -> None:
    """Let a GradScaler forget what it unscaled in a window that is run again; the scale itself stays.

    Source: torch/amp/grad_scaler.py, `update`, which ends every step so.
    """
    if scaler is not None and scaler.is_enabled():
        scaler._per_optimizer_states.clear()


def release_memory(error: BaseException | None = None) -> None:
    """Give back what a failed attempt holds: its frames keep activations alive, and the allocator free blocks."""
    while error is not None:
        with suppress(RuntimeError):  # a frame that still runs
            traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device has no memory left, by its type alone."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    kind = getattr(torch, "AcceleratorError", None)  # what CUDA itself refuses, outside torch's allocator
    return kind is not None and isinstance(error, kind) and getattr(error, "error_code", None) == 2


def find_phase(error: BaseException) -> str:
    """Return whether backward or forward was running, from the frames the error went through."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    engine = any(code.co_filename.endswith("torch/autograd/graph.py") for code in frames)
    return "backward" if engine or any(code.co_name == "backward" for code in frames) else "forward"

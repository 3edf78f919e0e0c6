"""Activations that wait on the host between forward and backward.

A copy to the host leaves the card's memory as soon as nothing else holds the tensor; the copy back takes new memory.
Here the host's side is a note of shape and layout, and the copy back an empty tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

_LEAST_BYTES = 1024
_FORWARD_STASH = 5
_LEAST_LAYER_BYTES = 2 * 1024 * 1024
_SAVED = object()


class OnHost(NamedTuple):
    """What is known on the device of a tensor on the host."""

    shape: torch.Size
    """Its shape."""
    stride: tuple[int, ...]
    """Its layout."""
    dtype: torch.dtype
    """Its element type."""
    num_stored: int
    """Elements that were copied: fewer than it has where it is broadcast."""

    def bring_back(self, device: torch.device) -> torch.Tensor:
        """Return an empty tensor where the copy would be."""
        whole = torch.empty(self.num_stored, dtype=self.dtype, device=device)
        return torch.as_strided(whole, self.shape, self.stride)


def describe(tensor: torch.Tensor) -> OnHost:
    """Return the note that stands for a copy on the host."""
    stored = tensor.numel()
    if 0 in tensor.stride():
        stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    return OnHost(tensor.shape, tensor.stride(), tensor.dtype, stored)


@contextlib.contextmanager
def host_context() -> Iterator[None]:
    """Everything saved goes to the host. Source: torch/autograd/graph.py save_on_cpu."""
    device = torch.device("cpu")
    with torch.autograd.graph.saved_tensors_hooks(describe, lambda note: note.bring_back(device)):
        yield


class SavedTensors:
    """What autograd saves goes to the host, but for parameters, small tensors, and what the head saves.

    A tensor stays on the device until five later ones were moved; one that is saved again meanwhile stays for good. In
    the backward pass a copy lives until the next node has run.

    Source: trl models/activation_offloading.py OffloadActivations with streams.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Start with nothing moved; the model's parameters stay where they are."""
        self._parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._next = 0
        self._saved: dict[int, torch.Tensor | OnHost] = {}
        self._stash: dict[int, torch.Tensor] = {}
        self._owner: dict[tuple[int, int, torch.dtype], int] = {}
        self._keys: dict[int, tuple[int, int, torch.dtype]] = {}
        self._back: dict[int, torch.Tensor] = {}
        self._node: Any = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Move while the context lasts: a training step, forward and backward."""
        self._forget()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            try:
                yield
            finally:
                self._forget()

    def _forget(self) -> None:
        for one in (self._saved, self._stash, self._owner, self._keys, self._back):
            one.clear()
        self._node = None

    def _pack(self, tensor: torch.Tensor) -> int:
        self._next += 1
        number, address = self._next, tensor.untyped_storage()._cdata
        key = (address, tensor.storage_offset(), tensor.dtype)
        if key in self._owner:
            self._saved[number] = tensor
            self._track(key, number)
            return number
        small = tensor.numel() * tensor.element_size() < _LEAST_BYTES
        if small or isinstance(tensor, torch.nn.Parameter) or address in self._parameters:
            self._saved[number] = tensor
            return number
        if 0 not in tensor.stride() and (not tensor.is_contiguous() or tensor.storage_offset()):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        for old in [one for one in self._stash if one <= number - _FORWARD_STASH]:
            del self._stash[old]
            self._release(old)
        self._saved[number], self._stash[number] = describe(tensor), tensor
        self._track(key, number)
        return number

    def _track(self, key: tuple[int, int, torch.dtype], number: int) -> None:
        self._owner[key], self._keys[number] = number, key

    def _release(self, number: int) -> None:
        key = self._keys.pop(number, None)
        if key is not None and self._owner.get(key) == number:
            del self._owner[key]

    def _unpack(self, number: int) -> torch.Tensor:
        saved = self._saved.pop(number)
        self._release(number)
        if not isinstance(saved, OnHost):
            return saved
        node, done = torch._C._current_autograd_node(), []
        if node is not self._node:
            self._node, done = node, list(self._back)
        tensor = self._stash.get(number)
        moved = tensor is None
        if tensor is None:
            tensor = self._back[number] = saved.bring_back(torch.device("cpu"))
        count = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
        node.register_hook(self._after(number if moved else None, count, done))
        return tensor

    def _after(self, number: int | None, count: int, done: list[int]) -> Callable[..., None]:
        """What is let go once the node has run: what earlier nodes used, and what a view of it now holds anyway."""

        def let_go(outputs: Any, inputs: Any) -> None:
            tensor = self._back.get(number) if number is not None else None
            if tensor is not None and torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > count:
                self._back.pop(number)  # type: ignore[arg-type]
            self._stash.clear()
            for one in done:
                self._back.pop(one, None)

        return let_go


def spare_head(model: torch.nn.Module) -> None:
    """Let the output matrix save on the device, since its backward comes at once.

    Source: trl models/activation_offloading.py get_act_offloading_ctx_manager.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, torch.nn.Module):
        return
    contexts: list[Any] = []

    def enter(*_: Any) -> None:
        contexts.append(torch.autograd.graph.saved_tensors_hooks(lambda one: one, lambda one: one))
        contexts[-1].__enter__()

    head.register_forward_pre_hook(enter)
    head.register_forward_hook(lambda *_: contexts.pop().__exit__(None, None, None), always_call=True)


@dataclass(slots=True)
class DeviceBuffers:
    """Where Unsloth brings layer inputs back to: two buffers of one layer input that stay for good.

    Source: unsloth_zoo gradient_checkpointing.py UnslothCheckpointFunction: a second buffer is used after the first
    pass where 512 MiB of the card are free, which is taken to be so; the last layer keeps its input from then on.
    """

    buffers: list[torch.Tensor] = field(default_factory=list)
    num_layers: int = 0
    current: int = 0
    first_pass: bool = True
    slot: int = 0

    def count(self, hidden: torch.Tensor) -> bool:
        """Count a layer in, and return whether its input goes to the host."""
        self.num_layers += self.first_pass
        self.current += 1
        if self._stored_bytes(hidden) <= _LEAST_LAYER_BYTES:
            return False
        return self.first_pass or self.current != self.num_layers

    def reserve(self, hidden: torch.Tensor) -> int:
        """Make the buffers as large as this input, and return which of them it comes back to."""
        num_bytes = self._stored_bytes(hidden)
        wanted = 1 if self.first_pass else 2
        for index in range(wanted):
            if index == len(self.buffers):
                self.buffers.append(torch.empty(num_bytes, dtype=torch.uint8, device=hidden.device))
            elif self.buffers[index].numel() < num_bytes:
                self.buffers[index] = torch.empty(num_bytes, dtype=torch.uint8, device=hidden.device)
        self.slot = 1 - self.slot
        return self.slot

    def end_forward(self) -> None:
        """The backward pass has begun."""
        self.first_pass, self.current = False, 0

    def _stored_bytes(self, hidden: torch.Tensor) -> int:
        return hidden.numel() * stored_dtype(hidden.dtype).itemsize


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype a layer input has on the host: Unsloth narrows fp32 to bf16."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def offloaded_checkpoint(buffers: DeviceBuffers, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a layer whose input waits on the host and is brought back into one of two buffers."""
    kwargs.pop("use_reentrant", None)
    run = (lambda *tensors: function(*tensors, **kwargs)) if kwargs else function
    return _OffloadedLayer.apply(run, buffers, *args)


class _OffloadedLayer(torch.autograd.Function):
    """Source: unsloth_zoo gradient_checkpointing.py UnslothCheckpointFunction."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], buffers: DeviceBuffers, hidden: torch.Tensor, *rest: Any) -> Any:
        ctx.run, ctx.buffers, ctx.note, ctx.slot = run, buffers, None, None
        ctx.autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        ctx.rest = [_SAVED if isinstance(one, torch.Tensor) else one for one in rest]
        kept = [one for one in rest if isinstance(one, torch.Tensor)]
        if hidden.requires_grad and buffers.count(hidden):
            ctx.slot, ctx.note = buffers.reserve(hidden), (hidden.shape, hidden.dtype)
        else:
            kept.insert(0, hidden)
        ctx.save_for_backward(*kept)
        with torch.no_grad():
            return run(hidden, *rest)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.buffers.end_forward()
        kept = list(ctx.saved_tensors)
        hidden = (_bring_back(ctx) if ctx.note else kept.pop(0)).detach().requires_grad_()
        rest = [kept.pop(0).detach() if one is _SAVED else one for one in ctx.rest]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast("cpu", dtype, enabled=enabled):
            outputs = ctx.run(hidden, *rest)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        pairs = [(one, gradient) for one, gradient in zip(outputs, gradients, strict=False)
                 if isinstance(one, torch.Tensor) and one.requires_grad]  # fmt: skip
        torch.autograd.backward([one for one, _ in pairs], [gradient for _, gradient in pairs])
        return (None, None, hidden.grad, *(None for _ in ctx.rest))


def _bring_back(ctx: Any) -> torch.Tensor:
    shape, dtype = ctx.note
    buffer = ctx.buffers.buffers[min(ctx.slot, len(ctx.buffers.buffers) - 1)]
    narrow = stored_dtype(dtype)
    stored = buffer[: shape.numel() * narrow.itemsize].view(narrow).view(shape)
    return stored if narrow == dtype else stored.to(dtype)

"""A CPU that pretends to be a small card: real tensors, real training, and an out-of-memory at a given capacity.

Every storage that an operator makes, or meets for the first time, is counted until nobody holds it. One that would go
over the capacity is refused with `torch.OutOfMemoryError`, worded as CUDA words it, since other tools match that text.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_iter

from brim.spec.device import BLOCK_BYTES
from brim.units import format_size

Refuse = Callable[[int, int], bool]


class CappedMemory(TorchDispatchMode):
    """While entered, this process's CPU has a capacity.

        with CappedMemory(2 * GIB):
            train()

    Autograd runs backward in the calling thread on a CPU, so what it allocates counts too; other threads do not.

    Leaves out: what an operator allocates and frees inside itself, fragmentation, and that a refused operator has run
    already, which matters only for one that also writes in place.
    """

    def __init__(self, capacity_bytes: int, refuse: Refuse | None = None) -> None:
        """Begin with nothing allocated.

        Args:
            capacity_bytes: bytes that may be allocated at once.
            refuse: given the number of an allocation, from 0, and its bytes: whether it fails however much is free.
        """
        super().__init__()
        self.capacity_bytes = capacity_bytes
        self.allocated_bytes = self.peak_bytes = 0
        self.num_allocations = self.num_ooms = 0
        self.refuse = refuse
        self._held: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def reset_peak(self) -> None:
        """Let the peak begin again from what is allocated now."""
        self.peak_bytes = self.allocated_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count what it made."""
        kwargs = kwargs or {}
        for value in tree_iter((args, kwargs)):
            self._count(value, is_new=False)
        found = func(*args, **kwargs)
        for value in tree_iter(found):
            self._count(value, is_new=True)
        return found

    def _count(self, tensor: Any, *, is_new: bool) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held or not storage.nbytes():
            return
        num_bytes = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        if is_new:
            self._admit(num_bytes)
        self._held[key] = (num_bytes, weakref.ref(storage, lambda _: self._free(key)))
        self.allocated_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)

    def _admit(self, num_bytes: int) -> None:
        number = self.num_allocations
        self.num_allocations += 1
        free_bytes = self.capacity_bytes - self.allocated_bytes
        if num_bytes > free_bytes or (self.refuse is not None and self.refuse(number, num_bytes)):
            self.num_ooms += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {format_size(num_bytes)}. This capped CPU has a total capacity "
                f"of {format_size(self.capacity_bytes)} of which {format_size(max(free_bytes, 0))} is free."
            )

    def _free(self, key: int) -> None:
        num_bytes, _ = self._held.pop(key)
        self.allocated_bytes -= num_bytes


def find_capped() -> CappedMemory | None:
    """Return the capped CPU that is entered now, innermost; None if there is none."""
    modes = reversed(_get_current_dispatch_mode_stack())
    return next((mode for mode in modes if isinstance(mode, CappedMemory)), None)

"""Every storage of a step, from the operation that made it to the moment nobody holds it: a stream of events.

Tensors may be fake (no data) or real. Views, detached copies and in-place operations make no storage and cost nothing.

Source: torch/distributed/_tools/mem_tracker.py follows storages the same way; it fails on frozen parameters.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from brim.probes.pieces import Event
from brim.spec.device import BLOCK_BYTES

Category = Literal[
    "parameter", "buffer", "gradient", "optimizer_state", "activation", "temporary", "input", "workspace", "paged"
]
Workspaces = Callable[[Any, tuple[Any, ...], Any], Iterable[int]]

_ENGINE = ("_engine_run_backward", "graph.py")
_LOOP = ("/brim/probes/step.py", "/brim/probes/preferences.py")
# Autograd's functions that write a new tensor only because they meet a subclass: sums of gradients (input_buffer.cpp
# accumulate), the gradient of indexing (torch/csrc/autograd/FunctionsManual.cpp index_backward).
_IN_PLACE_IN_ENGINE = (torch.ops.aten.add.Tensor, torch.ops.aten.index_put.default)
_MODES = ("_python_dispatch.py", "eval_frame.py", "_compile.py")


@dataclass(slots=True)
class Storage:
    """Where a storage comes from."""

    key: int
    """Number of the storage, in order of allocation."""
    num_bytes: int
    """Bytes the tensor asked for, before rounding."""
    op: str
    """Operator that made it."""
    module: str
    """Path of the module whose forward ran; empty in the backward pass and outside the model."""
    phase: str
    """Phase of the step it was made in."""
    dtype: str
    """Element type of the first tensor on it."""
    shape: tuple[int, ...]
    """Shape of the first tensor on it."""
    layer: int = -1
    """Which of the repeated layers it belongs to: the one that ran, or that of the tensor it was made from."""
    category: Category = "temporary"
    """What it holds; known for sure only when the step is over."""
    line: str = ""
    """File and line of the model's code that ran; empty in the backward pass and outside the model."""
    name: str = ""
    """Name of the parameter it holds, or whose gradient or optimizer state it holds; empty for others."""


class StorageTracker(TorchDispatchMode):
    """Records allocations and frees of storages made while the mode is on, as a stream of events."""

    follows = True
    """Whether storages are followed."""

    def __init__(
        self, workspaces: Workspaces | None = None, scalar: float | None = None,
        kind: type[torch.Tensor] = torch.Tensor, block_bytes: int = BLOCK_BYTES,
    ) -> None:  # fmt: skip
        """Start with an empty stream.

        Args:
            workspaces: bytes an operator allocates inside and frees before it returns, given operator, arguments
                and result.
            scalar: what `.item()` of a fake tensor answers; None lets it fail.
            kind: the tensors to follow; under a fake mode, real ones live on the host.
            block_bytes: sizes round up to multiples of it.
        """
        super().__init__()
        self.events: list[Event] = []
        self.storages: dict[int, Storage] = {}
        self.phase = ""
        self.modules: list[str] = []
        self.layer = -1
        self.scalars_asked: set[str] = set()
        self.notes: list[str] = []
        self.read_scalar: Callable[[torch.Tensor], Any] | None = None
        self._workspaces, self._scalar, self._kind, self._block_bytes = workspaces, scalar, kind, block_bytes
        self._keys: dict[int, int] = {}
        self._watchers: dict[int, weakref.ref[Any]] = {}
        self._sums: tuple[int, tuple[int, ...]] | None = None
        self._is_muted = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # one Python frame less per operator; nothing is compiled here

    def begin(self, phase: str) -> None:
        """Name what comes next."""
        self.phase, self.layer = phase, -1
        self.events.append(Event(-1, 0, phase))

    def follow(self, tensors: Iterable[torch.Tensor | tuple[str, torch.Tensor]], category: Category) -> None:
        """Take tensors made before as allocated now; pairs give each its name."""
        for one in tensors:
            name, tensor = one if isinstance(one, tuple) else ("", one)
            key = self._add(tensor, "")
            if key is not None:
                self.storages[key].category, self.storages[key].name = category, name

    def label(self, tensors: Iterable[torch.Tensor], category: Category) -> None:
        """Say what tensors hold, whenever they were made."""
        for tensor in tensors:
            key = self._keys.get(tensor.untyped_storage()._cdata, -1)
            if key >= 0:
                self.storages[key].category = category

    def call(self, tensors: Iterable[torch.Tensor], name: str) -> None:
        """Give storages the name of the parameter they belong to."""
        for key in self.keys_of(tensors):
            self.storages[key].name = name

    def name_of(self, tensor: torch.Tensor) -> str:
        """Return the name of the parameter a tensor's storage holds; empty if it has none."""
        key = self._keys.get(tensor.untyped_storage()._cdata, -1)
        return self.storages[key].name if key >= 0 else ""

    def tag(self, tensors: Iterable[torch.Tensor], layer: int) -> None:
        """Say which of the repeated layers tensors belong to."""
        for key in self.keys_of(tensors):
            self.storages[key].layer = layer

    def layer_of(self, tensor: torch.Tensor) -> int:
        """Return which of the repeated layers a tensor's storage belongs to, -1 if none."""
        key = self._keys.get(tensor.untyped_storage()._cdata, -1)
        return self.storages[key].layer if key >= 0 else -1

    def label_live(self, made_from: int, category: Category) -> None:
        """Say what all still unnamed storages hold that were made since a key and are alive now."""
        for key in self._keys.values():
            if key >= made_from and self.storages[key].category == "temporary":
                self.storages[key].category = category

    def reserve(self, num_bytes: int, op: str) -> None:
        """Record a storage that no tensor stands for and nothing frees: a library's workspace."""
        key = self._record(num_bytes, op, "byte", (num_bytes,))
        self.storages[key].category = "workspace"

    def move_to_host(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take tensors out of the stream: a card's process keeps them on the host."""
        addresses = [tensor.untyped_storage()._cdata for tensor in tensors]
        gone = {self._keys[address] for address in addresses if self._keys.get(address, -1) >= 0}
        self._keys.update(dict.fromkeys(addresses, -1))
        self.events = [event for event in self.events if event.key not in gone]

    def keys_of(self, tensors: Iterable[torch.Tensor]) -> list[int]:
        """Return the numbers of tensors' storages, those not followed left out."""
        keys = (self._keys.get(tensor.untyped_storage()._cdata, -1) for tensor in tensors)
        return [key for key in keys if key >= 0]

    @property
    def next_key(self) -> int:
        """Number the next storage will get."""
        return len(self.storages)

    @property
    def live_keys(self) -> set[int]:
        """Numbers of the storages that are alive."""
        return set(self._keys.values())

    def copy(self, event: Event, names: dict[int, int]) -> None:
        """Record an event again, of a storage of its own.

        Args:
            event: an allocation or free that was recorded before.
            names: numbers of the storages that stand for those of events copied so far.
        """
        if event.num_bytes > 0:
            names[event.key] = key = len(self.storages)
            self.storages[key] = self.storages[event.key]
        self.events.append(Event(names[event.key], event.num_bytes, self.phase, event.layer))

    def release(self, key: int) -> None:
        """Record the end of a storage whose tensor goes on to stand for another one, see `rename`."""
        self.events.append(Event(key, -self._rounded(self.storages[key].num_bytes), self.phase, self.layer))

    def rename(self, key: int, new_key: int) -> None:
        """Let the tensor of a storage stand for another one from here on."""
        self._keys.update({address: new_key for address, one in self._keys.items() if one == key})

    def adopt(self, tensor: torch.Tensor, key: int) -> None:
        """Take a tensor that was not followed for a storage that was copied: its end is the storage's."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        self._keys[address] = key
        self._watchers[address] = weakref.ref(storage, lambda _: self._free(address))

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Follow nothing that is made inside."""
        self._is_muted = True
        try:
            yield
        finally:
            self._is_muted = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if self._is_muted:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default and hasattr(args[0], "fake_device"):
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default and self._scalar is not None:
            known = self.read_scalar(args[0]) if self.read_scalar is not None else None
            return self._answer_scalar(args[0]) if known is None else known
        self._sums = None
        result = func(*args, **(kwargs or {}))
        self._follow_result(func, args, result)
        return result

    def _answer_scalar(self, tensor: torch.Tensor) -> Any:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename.endswith(_MODES):
            frame = frame.f_back
        if frame is not None:
            self.scalars_asked.add(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        kinds = {torch.bool: bool, torch.float32: float, torch.float64: float, torch.bfloat16: float}
        return kinds.get(tensor.dtype, int)(self._scalar or 0)

    def _follow_result(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        made, origins = None, list(_tensors(args[0])) if args else []
        for index, tensor in enumerate(_tensors(result)):
            key = self._add(tensor, func)
            made = key if made is None else made
            if key is not None and self.layer < 0 and index < len(origins):
                self.storages[key].layer = self.layer_of(origins[index])
        if made is None:
            return
        if self._workspaces is not None:
            self._pass(self._workspaces(func, args, result), func)
        if func in _IN_PLACE_IN_ENGINE and _called_by_engine():
            # The engine adds to the gradient that came first, unless it is a view: another tensor holds its storage.
            addends = (one for one in args[:1] if isinstance(one, torch.Tensor) and not one._is_view())
            self._sums = made, tuple(self.keys_of(addends))

    def _add(self, tensor: torch.Tensor, op: Any) -> int | None:
        if not isinstance(tensor, self._kind):
            return None
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._keys or storage.nbytes() == 0:
            return None
        key = self._record(storage.nbytes(), op, str(tensor.dtype)[6:], tuple(tensor.shape))
        self._keys[address] = key
        self._watchers[address] = weakref.ref(storage, lambda _: self._free(address))
        return key

    def _record(self, num_bytes: int, op: Any, dtype: str, shape: tuple[int, ...]) -> int:
        key, module = len(self.storages), self.modules[-1] if self.modules else ""
        self.storages[key] = Storage(
            key, num_bytes, str(op), module, self.phase, dtype, shape, self.layer, line=_model_line() if module else ""
        )
        self.events.append(Event(key, self._rounded(num_bytes), self.phase, self.layer))
        return key

    def _pass(self, sizes: Iterable[int], op: Any) -> None:
        """Record buffers that an operator holds together; C++ frees the last one first."""
        made = [(self._record(size, f"{op} workspace", "byte", (size,)), size) for size in sizes]
        for key, size in reversed(made):
            self.events.append(Event(key, -self._rounded(size), self.phase, self.layer))

    def _free(self, address: int) -> None:
        key = self._keys.pop(address)
        del self._watchers[address]
        if key < 0:
            return
        num_bytes = self._rounded(self.storages[key].num_bytes)
        if self._sums is not None and key in self._sums[1] and self._sums_in_place(key, num_bytes):
            return
        self.events.append(Event(key, -num_bytes, self.phase, self.layer))

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self._block_bytes) * self._block_bytes

    def _sums_in_place(self, key: int, num_bytes: int) -> bool:
        """Give the sum the place of the addend that died with it, as autograd does outside of tensor subclasses.

        Source: torch/csrc/autograd/input_buffer.cpp accumulate, can_accumulate_inplace: not for subclasses, so with
        fake tensors the engine makes a third tensor that it does not make on a card.
        """
        assert self._sums is not None
        made, self._sums = self._sums[0], None
        last = self.events[-1]
        if last.key != made or last.num_bytes != num_bytes:
            return False
        self.events.pop()
        old, new = self.storages[key], self.storages[made]
        # The sum lives on in the addend's place: its events carry the addend's number from here on.
        self.storages[made] = old
        for address, one in self._keys.items():
            if one == made:
                self._keys[address] = key
        old.category = new.category
        return True


def _tensors(result: Any) -> Iterable[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return (result,)
    if isinstance(result, (tuple, list)):
        return (one for one in result if isinstance(one, torch.Tensor))
    if isinstance(result, Mapping):
        return (one for one in result.values() if isinstance(one, torch.Tensor))
    return ()


def _model_line() -> str:
    """Return file and line of the innermost frame that is the model's own code: neither torch's nor brim's."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        code = frame.f_code
        own = _OWN_CODE.get(code)
        if own is None:
            own = _OWN_CODE[code] = _owner(code.co_filename)
        if own == "model":
            return f"{code.co_filename.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        if own == "loop":
            return ""
        frame = frame.f_back
    return ""


_OWN_CODE: dict[CodeType, str] = {}


def _owner(path: str) -> str:
    """Whose code a file is: the step's loop, PyTorch's and brim's stand-ins for it, or the model's."""
    if path.endswith(_LOOP):
        return "loop"
    return "torch" if "/torch/" in path or "/brim/probes/" in path or "/peft/" in path else "model"


def _called_by_engine() -> bool:
    """Whether the operator was called by autograd itself, not by Python code that it runs."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_code.co_filename.endswith(_MODES):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == _ENGINE[0] and frame.f_code.co_filename.endswith(_ENGINE[1])

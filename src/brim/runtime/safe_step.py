"""An optimizer step that an out-of-memory leaves either done or not begun, tensor by tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from brim.runtime.restore import is_out_of_memory, local_part, release_memory

COVERED = tuple(
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam")
)
"""Optimizers that treat each tensor by itself, so that a step may be taken some tensors at a time."""
_OF_WHOLE_TENSORS = tuple(getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name))
"""Those that also look at a tensor as a whole (its norm, its rows): covered unless it is sharded."""
_OF_A_SCALER = ("grad_scale", "found_inf")
"""What a GradScaler hands to fused kernels, and others refuse. Source: torch/amp/grad_scaler.py, `step`."""
_CHUNK_BYTES, _CHUNK_BYTES_ON_HOST = 32 * 2**20, 2**19
"""Parameters stepped together: their undo copies and the step's own temporaries are a few times this, not the model.

Enough for a kernel on a device. On the host fresh pages cost more than what is copied into them: so little that the
next chunk gets the pages of the last one, and they are in its cache (a fifth of the cost of 32 MiB).
"""


class HalfStepped(RuntimeError):
    """An optimizer that cannot be taken apart ran out of memory inside its step: weights may be half new."""


class SafeStep:
    """Stands in for `optimizer.step`.

        optimizer.step = SafeStep(optimizer)

    Tensors are stepped a few at a time, and those few are copied first. If memory runs out, they are put back and
    stepped again one by one on the host, which needs nothing of the device once its states exist. Adam's states are
    made before its first step writes anything. Results are the same to the bit, but for the rounding of a host's
    arithmetic where the device's is another.

    Leaves out: other optimizers than `COVERED`, step hooks and closures; there the step runs as it is, and an
    out-of-memory inside it raises `HalfStepped`. Fused kernels write all or nothing, so nothing large is copied.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, on_failure: Callable[[BaseException], None] | None = None):
        """Stand in for the step of an optimizer.

        Args:
            optimizer: the innermost one, not Accelerate's wrapper.
            on_failure: told of each out-of-memory that was survived.
        """
        self.optimizer, self._theirs = optimizer, optimizer.step
        self._on_failure = on_failure or (lambda error: None)

    @property
    def covers(self) -> bool:
        """Whether a step can be taken apart."""
        own = self.optimizer
        if own._optimizer_step_pre_hooks or own._optimizer_step_post_hooks:
            return False
        if _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
            return False
        sharded = any(hasattr(one, "to_local") for group in own.param_groups for one in group["params"])
        return type(own) in COVERED or (type(own) in _OF_WHOLE_TENSORS and not sharded)

    def __call__(self, closure: Any = None) -> Any:
        """Take one optimizer step."""
        if closure is not None or not self.covers:
            return self._step_whole(closure)
        self._try_again(self._make_states)
        for group, parameters in self._list_chunks():
            self._step_chunk(group, parameters)
        return None

    def _try_again(self, act: Callable[[], None]) -> None:
        """Do what leaves nothing behind when it fails; once more with all free memory given back."""
        try:
            return act()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._on_failure(error)
            release_memory(error)
        return act()

    def _step_whole(self, closure: Any) -> Any:
        try:
            return self._theirs(closure) if closure is not None else self._theirs()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise HalfStepped(f"{type(self.optimizer).__name__} ran out of memory inside its step") from error

    def _make_states(self) -> None:
        """Make Adam's states as Adam would, all of them before a tensor is written. Source: torch/optim/adam.py."""
        if type(self.optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            return
        made: list[Tensor] = []
        try:
            for group, parameters in self._list_chunks():
                for parameter in parameters:
                    if not self.optimizer.state[parameter]:
                        made.append(parameter)
                        self.optimizer.state[parameter] = _first_state(group, parameter)
        except Exception:
            for parameter in made:
                self.optimizer.state.pop(parameter, None)
            raise

    def _list_chunks(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        for group in self.optimizer.param_groups:
            chunk, held = [], 0
            copies = not group.get("fused")
            for parameter in list(group["params"]):
                if parameter.grad is None:
                    continue
                local = local_part(parameter)
                chunk.append(parameter)
                held += local.numel() * local.element_size()
                if held >= (_CHUNK_BYTES_ON_HOST if copies and local.device.type == "cpu" else _CHUNK_BYTES):
                    yield group, chunk
                    chunk, held = [], 0
            if chunk:
                yield group, chunk

    def _step_chunk(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        kept: list[_Kept] = []
        try:
            kept += [_Kept(self.optimizer, one, scalars_only=bool(group.get("fused"))) for one in parameters]
            with self._only(group, parameters):
                self._theirs()
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(kept) == len(parameters):  # else copying failed, and nothing was written
                for one in kept:
                    one.restore()
            self._on_failure(error)
            release_memory(error)
        kept.clear()
        for parameter in parameters:
            try:
                self._try_again(lambda one=parameter: self._step_apart(group, one))
            except torch.OutOfMemoryError as error:
                raise HalfStepped(f"no memory for the states of {tuple(parameter.shape)}") from error

    def _step_apart(self, group: dict[str, Any], parameter: Tensor) -> None:
        """Step one tensor on copies on the host, and write what comes out: writing allocates nothing."""
        twin = torch.nn.Parameter(_to_host(parameter))
        twin.grad = _to_host(parameter.grad)
        scale, overflowed = (getattr(self.optimizer, name, None) for name in _OF_A_SCALER)
        if overflowed is not None and float(overflowed):
            return  # the fused kernel would have written nothing
        if scale is not None:
            twin.grad.div_(scale.cpu())
        states = self.optimizer.state
        states[twin] = {name: _to_host(value) for name, value in states.get(parameter, {}).items()}
        try:
            # Single and foreach kernels round differently (NAdam, RAdam): those that the step would have taken.
            foreach = group.get("foreach") if group.get("foreach") is not None else parameter.device.type != "cpu"
            with self._only(group, [twin], foreach=foreach, fused=False, capturable=False):
                self._theirs()
            result = states[twin]
        finally:
            states.pop(twin, None)
        old = states.get(parameter, {})
        new = {name: old[name] if name in old else _place(value, parameter, group) for name, value in result.items()}
        with torch.no_grad():
            for name, value in result.items():
                if isinstance(value, Tensor) and new[name] is not None:
                    local_part(new[name]).copy_(value)
                else:
                    new[name] = value
            local_part(parameter).copy_(twin.detach())
        if new:
            states[parameter] = new

    @contextmanager
    def _only(self, group: dict[str, Any], parameters: Sequence[Tensor], **settings: Any) -> Iterator[None]:
        """Let the optimizer see some tensors of one group, with other kernels where settings say so."""
        groups = self.optimizer.param_groups
        kept = [dict(one) for one in groups]
        for one in groups:
            one["params"] = list(parameters) if one is group else []
        group.update({name: value for name, value in settings.items() if name in group})
        if settings and isinstance(group.get("lr"), Tensor):
            group["lr"] = group["lr"].cpu()
        scaled = {name: getattr(self.optimizer, name) for name in _OF_A_SCALER if hasattr(self.optimizer, name)}
        for name in scaled if settings else ():
            setattr(self.optimizer, name, None)
        try:
            yield
        finally:
            for name, value in scaled.items():
                setattr(self.optimizer, name, value)
            for one, before in zip(groups, kept, strict=True):
                one.update(before)


class _Kept:
    """One tensor and its states as they were."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameter: Tensor, *, scalars_only: bool) -> None:
        self._optimizer, self._parameter = optimizer, parameter
        self._value = None if scalars_only else local_part(parameter).clone()
        self._names = set(optimizer.state.get(parameter, ()))
        self._states = {
            name: local_part(value).clone() if isinstance(value, Tensor) else copy.copy(value)
            for name, value in optimizer.state.get(parameter, {}).items()
            if not (scalars_only and isinstance(value, Tensor) and value.numel() > 1)
        }

    def restore(self) -> None:
        states = self._optimizer.state
        if not self._names:
            states.pop(self._parameter, None)
        with torch.no_grad():
            if self._value is not None:
                local_part(self._parameter).copy_(self._value)
            if self._names:
                held = states[self._parameter]
                for name in set(held) - self._names:
                    del held[name]
                for name, value in self._states.items():
                    if isinstance(value, Tensor) and isinstance(held.get(name), Tensor):
                        local_part(held[name]).copy_(value)
                    else:
                        held[name] = value


def _first_state(group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    near = group["capturable"] or group["fused"]
    double = torch.get_default_dtype() == torch.float64 and not group["fused"]
    dtype = torch.float64 if double else torch.float32
    step = torch.zeros((), dtype=dtype, device=local_part(parameter).device if near else "cpu")
    names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
    zeros = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in names}
    return {"step": step, **zeros}


def _place(value: Any, parameter: Tensor, group: dict[str, Any]) -> Any:
    """Return room for a state that did not exist yet, where the optimizer would have made it."""
    if not isinstance(value, Tensor):
        return None
    if value.shape == local_part(parameter).shape and value.dim():
        return torch.zeros_like(parameter, dtype=value.dtype)
    near = group.get("capturable") or group.get("fused") or value.dim()
    return torch.empty_like(value, device=local_part(parameter).device if near else "cpu")


def _to_host(value: Any) -> Any:
    return local_part(value).to("cpu", copy=True) if isinstance(value, Tensor) else copy.copy(value)

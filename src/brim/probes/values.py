"""What is known of the values of tensors without data: token ids, masks, image grids, which expert a token goes to.

Fake tensors have shapes and no data. Integers and masks that follow from the inputs are computed beside them for
real, so that code that reads them (`.tolist()`, `nonzero`, a boolean index, a loop over experts) runs its own course.
What follows from weights is not known; where code picks the best of unknown scores, a stated choice stands in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from brim.probes.experts import spread_evenly

Choose = Callable[[tuple[int, ...], int], torch.Tensor]
"""Returns indices of a shape below a count: whom unknown scores elect, best first in the last dim."""

_MOST_WHOLE, _MOST_FLOAT = 1 << 26, 1 << 22
_NAME = "_brim_value"
_MIDDLE = 0.5
_aten = torch.ops.aten
_FILLED = {
    _aten.zeros_like.default: 0, _aten.new_zeros.default: 0, _aten.ones_like.default: 1, _aten.new_ones.default: 1,
}  # fmt: skip
_RANDOM = (_aten.rand.default, _aten.rand_like.default)
_UNWRITTEN = (
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
)  # fmt: skip
_VIEWS = frozenset((
    _aten.view.default, _aten._unsafe_view.default, _aten.t.default, _aten.transpose.int, _aten.detach.default,
))  # fmt: skip
_CTC_LOSSES = (_aten._ctc_loss.default, _aten._ctc_loss.Tensor)
_DTYPES = (torch.int64, torch.int32, torch.bool, torch.uint8, torch.int16, torch.int8)


class _Filled(NamedTuple):
    """Values of a tensor that holds one number throughout, before anything asks for them."""

    number: Any


class KnownValues(TorchDispatchMode):
    """Computes values beside fake tensors wherever they follow from known ones. Goes between fake mode and tracker."""

    def __init__(self, choose: Choose = spread_evenly) -> None:
        """Start with nothing known.

        Args:
            choose: whom unknown scores elect, where an operator picks the largest.
        """
        super().__init__()
        self._choose = choose
        self._spoiled: dict[int, torch.UntypedStorage] = {}
        self._make_tensor = torch.tensor
        self.chose = False

    def __enter__(self) -> KnownValues:
        """Switch on; `torch.tensor` then takes lists of tensors without data, whose memory it would read."""
        self._make_tensor = torch.tensor
        torch.tensor = self._tensor_of  # type: ignore[assignment]
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        """Switch off."""
        torch.tensor = self._make_tensor
        super().__exit__(*error)

    def _tensor_of(self, data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._make_tensor(_read_items(data) if isinstance(data, (list, tuple)) else data, *args, **kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def find_value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return a tensor's values, None if they are not known."""
        value = tensor.__dict__.get(_NAME)
        if isinstance(value, _Filled):
            value = _full(tensor, value.number)
            setattr(tensor, _NAME, value)
        return value if value is not None and value.untyped_storage()._cdata not in self._spoiled else None

    def _knows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's values are known, without making them."""
        value = tensor.__dict__.get(_NAME)
        if value is None or isinstance(value, _Filled):
            return value is not None
        return value.untyped_storage()._cdata not in self._spoiled

    def read_scalar(self, tensor: torch.Tensor) -> Any:
        """Return what `.item()` answers, None if it is not known."""
        value = self.find_value(tensor)
        with no_dispatch():
            return None if value is None else value.item()

    def describe(self) -> list[str]:
        """Return what stands in for values that depend on weights, to be said in an estimate's notes."""
        return ["where code picks the best of unknown scores (routers), picks are spread evenly"] if self.chose else []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and (known := self.read_scalar(args[0])) is not None:
            return known
        tensors = _list_tensors(args, kwargs)
        if not tensors:
            return self._make(func, args, kwargs)
        if not any(_NAME in one.__dict__ or not isinstance(one, FakeTensor) for one in tensors):
            return self._run_unknown(func, args, kwargs)  # the common case: weights and activations
        known = [not isinstance(one, FakeTensor) or self._knows(one) for one in tensors]
        if not any(known):
            return self._run_unknown(func, args, kwargs)
        if func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
            args = (args[0], self._list_places(args[1]), *args[2:])
        if _is_mutable(func):
            return self._run_in_place(func, args, kwargs)
        if not all(known):
            return self._run_unknown(func, args, kwargs)
        found = self._compute(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except DynamicOutputShapeException:
            if found is NotImplemented:
                raise
            result = _shape_like(found)
        return self._attach(result, found)

    def _make(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor out of nothing is known, but for random numbers, where every draw is the middle of its range."""
        result = func(*args, **kwargs)
        if not isinstance(result, FakeTensor) or func in _UNWRITTEN or not _is_small(result):
            return result
        if torch.Tag.nondeterministic_seeded in func.tags and func not in _RANDOM and result.is_floating_point():
            return result
        return self._attach(result, _full(result, _MIDDLE) if func in _RANDOM else self._compute(func, args, kwargs))

    def _run_unknown(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Something that depends on weights: only what is constant, or elected, is known."""
        if func in _VIEWS and args[0].constant is None:
            return _view(func, args)
        if _is_mutable(func):
            return self._run_in_place(func, args, kwargs)
        if func in _CTC_LOSSES:
            return self._make_ctc_loss(args[0], args[3])
        result = func(*args, **kwargs)
        if func not in _TOLD:
            return result
        if func in _FILLED or func is _aten.full_like.default:
            setattr(result, _NAME, _Filled(_FILLED.get(func, args[-1])) if _is_small(result) else None)
            return result
        place, dim = _ELECTIONS.get(func, (None, 0))
        if place is not None:
            chosen = result if place < 0 else result[place]
            self._attach(chosen, self._elect(chosen, args[0], args[dim] if 0 < dim < len(args) else -1))
        return result

    def _make_ctc_loss(self, log_probs: torch.Tensor, target_lengths: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses and the table of paths, whose width is data: twice the longest target and one.

        Source: aten/src/ATen/native/cuda/LossCTC.cu ctc_loss_gpu_template.
        """
        lengths = self.find_value(target_lengths) if isinstance(target_lengths, FakeTensor) else target_lengths
        if lengths is None:
            raise DynamicOutputShapeException(_aten._ctc_loss.Tensor)
        steps, batch = log_probs.shape[:2]
        with no_dispatch():
            longest = max(int(one) for one in lengths)
        return log_probs.new_empty(batch), log_probs.new_empty(batch, steps, 2 * longest + 1)

    def _elect(self, chosen: torch.Tensor, scores: torch.Tensor, dim: int | None) -> torch.Tensor | None:
        if dim is None or not scores.dim() or not _is_small(chosen):
            return None
        self.chose = True
        with no_dispatch():
            shape, count = list(chosen.shape), scores.shape[dim]
            if chosen.dim() == scores.dim():
                moved = [*shape[:dim], *shape[dim:][1:], shape[dim]] if dim >= 0 else shape
                return self._choose(tuple(moved), count).movedim(-1, dim).contiguous()
            return self._choose((*shape, 1), count).squeeze(-1)

    def _run_in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Write the known values too; what was known is spoiled by a write that is not known."""
        result = func(*args, **kwargs)
        written = [one for one in _list_written(func, args, kwargs) if isinstance(one, FakeTensor)]
        if func in (_aten.fill_.Scalar, _aten.zero_.default) and not self._knows(args[0]):
            if _is_small(args[0]) and args[0].is_contiguous() and _fills_storage(args[0]):
                self._attach(args[0], _full(args[0], args[1] if len(args) > 1 else 0))
            return result
        written = [one for one in written if self._knows(one)]
        if not written:
            return result
        random = torch.Tag.nondeterministic_seeded in func.tags
        fakes = (one for one in _list_tensors(args, kwargs) if isinstance(one, FakeTensor))
        if random or not all(self._knows(one) for one in fakes) or self._cannot(func, args, kwargs):
            for one in written:
                self._spoil(one)
        return result

    def _spoil(self, tensor: torch.Tensor) -> None:
        value = tensor.__dict__[_NAME]
        if isinstance(value, _Filled):  # no view of it was made: that would have taken its values
            setattr(tensor, _NAME, None)
        else:
            self._spoiled[value.untyped_storage()._cdata] = value.untyped_storage()

    def _cannot(self, func: Any, args: Any, kwargs: Any) -> bool:
        return self._compute(func, args, kwargs) is NotImplemented

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the operator's result on known values; NotImplemented where it has none."""
        with no_dispatch():
            try:
                args, kwargs = self._to_values(args), {key: self._to_values(one) for key, one in kwargs.items()}
                if "device" in kwargs:
                    kwargs["device"] = torch.device("cpu")
                return func(*args, **kwargs)
            except (RuntimeError, IndexError, NotImplementedError):
                return NotImplemented  # the value is then unknown, and the fake tensor alone goes on

    def _to_values(self, given: Any) -> Any:
        if isinstance(given, FakeTensor):
            return self.find_value(given)
        if isinstance(given, (list, tuple)):
            return type(given)(self._to_values(one) for one in given)
        return given

    def _list_places(self, indices: Any) -> list[Any]:
        """Replace boolean indices by the places they mark, as the kernel does before it reads them.

        Source: aten/src/ATen/native/IndexingUtils.h expandTensors.
        """
        places: list[Any] = []
        for index in indices:
            value = self.find_value(index) if isinstance(index, FakeTensor) else None
            if value is None or index.dtype not in (torch.bool, torch.uint8):
                places.append(index)
                continue
            with no_dispatch():
                found = value.nonzero()
                columns = found.unbind(1)
            whole = torch.empty(found.shape, dtype=torch.long, device=index.device)
            places += [self._attach(whole[:, at], column) for at, column in enumerate(columns)]
        return places

    def _attach(self, result: Any, known: Any) -> Any:
        if isinstance(result, (list, tuple)):
            if isinstance(known, (list, tuple)) and len(known) == len(result):
                for one, value in zip(result, known, strict=True):
                    self._attach(one, value)
        elif isinstance(result, FakeTensor) and isinstance(known, torch.Tensor) and known.shape == result.shape:
            setattr(result, _NAME, known if _is_small(result) else None)
        return result


_ELECTIONS: dict[Any, tuple[int, int]] = {
    _aten.topk.default: (1, 2), _aten.sort.default: (1, 1), _aten.max.dim: (1, 1), _aten.min.dim: (1, 1),
    _aten.argmax.default: (-1, 1), _aten.argmin.default: (-1, 1), _aten.argsort.default: (-1, 1),
}  # fmt: skip
"""Operators that pick by score: which result holds indices (-1: the only one), and which argument is the dim."""


_TOLD = frozenset((*_FILLED, _aten.full_like.default, *_ELECTIONS))
"""Operators whose results are known though what they are given is not."""


def _view(func: Any, args: Any) -> FakeTensor:
    """Return a view as fake mode makes it, without what it looks up first: half of a step's operators are views."""
    mode = args[0].fake_mode
    with in_kernel_invocation_manager(mode):
        made = func(*args)
    return FakeTensor(mode, made, args[0].fake_device)


@functools.cache
def _is_mutable(func: Any) -> bool:
    return bool(func._schema.is_mutable)


def _list_tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for one in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            found += (inner for inner in one if isinstance(inner, torch.Tensor))
    return found


def _read_items(data: Any) -> Any:
    if isinstance(data, FakeTensor):
        return data.item() if data.dim() == 0 else data.tolist()
    return type(data)(map(_read_items, data)) if type(data) in (list, tuple) else data


def _list_written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from given if isinstance(given, (list, tuple)) else () if given is None else (given,)


def _fills_storage(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= (_MOST_WHOLE if tensor.dtype in _DTYPES else _MOST_FLOAT)


def _full(tensor: torch.Tensor, value: Any) -> torch.Tensor:
    with no_dispatch():
        return torch.full(tuple(tensor.shape), value, dtype=tensor.dtype)


def _shape_like(known: Any) -> Any:
    if isinstance(known, (list, tuple)):
        return type(known)(_shape_like(one) for one in known)
    return torch.empty(tuple(known.shape), dtype=known.dtype, device="cpu")

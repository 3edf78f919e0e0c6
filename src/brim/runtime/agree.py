"""Ranks agree before each collective: no rank enters one that another will not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from brim.runtime.ranks import is_distributed
from brim.runtime.restore import is_out_of_memory, is_sharded, list_sharded

_BUCKET_BYTES = 25 * 2**20
"""Gradients are reduced in buckets as large as DDP's. Source: torch/nn/parallel/distributed.py, `bucket_cap_mb`."""


class PeerOutOfMemory(torch.OutOfMemoryError):
    """Another rank has run out of memory; it waits for this one to stop as well."""


class TooLate(RuntimeError):
    """Memory ran out where the other ranks were in a collective already: they cannot be told, and it not taken back."""


class Agreement:
    """A word between ranks, over a process group of its own that lives on the host.

    While an attempt is open, every collective of the step is preceded by a word. The rank that failed says so where the
    others ask next, so that all leave the attempt together, and nobody is left alone in a collective.
    """

    def __init__(self, group: Any = None, timeout_seconds: float = 600.0) -> None:
        """Make the group. A collective: every rank makes its agreement at the same place.

        Args:
            group: data-parallel process group; the default one if None.
            timeout_seconds: how long a rank waits for the others.
        """
        self.is_open = False
        self.num_words = 0
        self._group = None
        if is_distributed() and dist.get_world_size(group) > 1:
            ranks = dist.get_process_group_ranks(group) if group is not None else None
            self._group = dist.new_group(ranks, backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    @property
    def group(self) -> Any:
        """The process group of the words, on the host; None where there is one rank."""
        return self._group

    @property
    def num_ranks(self) -> int:
        """Ranks that agree."""
        return dist.get_world_size(self._group) if self._group is not None else 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what one rank writes for all."""
        return self._group is None or dist.get_rank(self._group) == 0

    def gather_worst(self, numbers: Sequence[int]) -> list[int]:
        """Return the largest of each number over all ranks."""
        if self._group is None:
            return list(numbers)
        self.num_words += 1
        word = torch.tensor(list(numbers), dtype=torch.int64)
        dist.all_reduce(word, dist.ReduceOp.MAX, group=self._group)
        return word.tolist()

    def anyone(self, failed: bool) -> bool:
        """Return whether any rank has failed; each says whether it has."""
        return bool(self.gather_worst([int(failed)])[0])

    def check(self) -> None:
        """Ask before a collective of an open attempt.

        Raises:
            PeerOutOfMemory: another rank has failed, and this one closes its attempt as well.
        """
        if self.is_open and self._group is not None and self.anyone(False):
            self.is_open = False
            raise PeerOutOfMemory("another rank is out of memory")

    def ask_before(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function with collectives in it that asks first, once however many they are.

        If it fails the attempt stays closed: the others are in it, and nobody will ask any more.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            self.check()
            was, self.is_open = self.is_open, False
            found = theirs(*args, **kwargs)
            self.is_open = was
            return found

        return call

    def tell(self, error: BaseException) -> None:
        """Tell the others, where they ask next, that this rank is out of memory; no word where they told it so.

        Raises:
            TooLate: they are where nobody asks any more.
        """
        if self.is_open:
            self.is_open = False
            self.anyone(True)
        elif self._group is not None and not isinstance(error, PeerOutOfMemory):
            raise TooLate("out of memory in a collective that other ranks are in") from error

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """While entered, collectives ask first; a rank that fails tells the others once."""
        self.is_open = True
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                self.tell(error)
            raise
        finally:
            self.is_open = False


class _Asking:
    """A collective of FSDP2 that asks before it begins; memory for it was allocated before."""

    def __init__(self, comm: Any, agreement: Agreement) -> None:
        self._comm, self._agreement = comm, agreement

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._agreement.ask_before(self._comm)(*args, **kwargs)


def ask_in_sharded(model: nn.Module, agreement: Agreement) -> None:
    """Let every all-gather and reduce-scatter of an FSDP2 module ask first; where they ask already, ask this one."""
    for part in model.modules():
        for group in list_sharded(part):
            for name in ("_all_gather_comm", "_reduce_scatter_comm"):
                comm = getattr(group, name)
                theirs = comm._comm if isinstance(comm, _Asking) else comm
                setattr(group, name, _Asking(theirs, agreement))


class AskInside(TorchDispatchMode):
    """While entered, collectives that sharded tensors run by themselves ask first: clipping sums norms over ranks."""

    def __init__(self, agreement: Agreement) -> None:
        super().__init__()
        self._agreement = agreement

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "to_local") for kind in types):
            return NotImplemented  # it comes back here as what it does to the local parts
        collective = getattr(func, "namespace", "") == "_c10d_functional" and "wait" not in func.__name__
        return (self._agreement.ask_before(func) if collective else func)(*args, **(kwargs or {}))


def can_overlap(model: nn.Module) -> bool:
    """Return whether DDP can be told to reduce as late as at the start of a backward pass."""
    return isinstance(model, nn.parallel.DistributedDataParallel) and not model.static_graph


def start_reducing(model: Any, loss: Tensor, agreement: Agreement) -> None:
    """Let DDP reduce in the backward pass that comes; its forward ran unsynced, so all could be taken back until now.

    Source: torch/nn/parallel/distributed.py, `_pre_forward` and `_post_forward`.
    """
    agreement.check()
    agreement.is_open = False
    model.reducer.prepare_for_forward()
    model.reducer.prepare_for_backward([loss] if model.find_unused_parameters else [])


def reduce_gradients(model: nn.Module, agreement: Agreement, group: Any = None) -> None:
    """Average gradients over ranks, as DDP does in backward, once all ranks agree that they have theirs.

    Raises:
        PeerOutOfMemory, torch.OutOfMemoryError: before any gradient was reduced; on every rank.
    """
    if agreement.num_ranks == 1 or is_sharded(model):
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    has = [int(parameter.grad is not None) for parameter in trained]
    agreement.check()  # a rank that failed says one word, and waits here for no other
    used = [one for one, anybody in zip(trained, agreement.gather_worst(has), strict=True) if anybody]
    for parameter in used:
        if parameter.grad is None:  # unused on this rank alone
            parameter.grad = torch.zeros_like(parameter)
    buckets = list(_fill_buckets([parameter.grad for parameter in used]))
    room = _make_room(buckets)
    agreement.check()
    agreement.is_open = False
    for bucket in buckets:
        _reduce_bucket(bucket, room, agreement.num_ranks, group)


def _fill_buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield gradients of one dtype and device that go together, in the order of the parameters."""
    bucket: list[Tensor] = []
    held = 0
    for gradient in gradients:
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (gradient.dtype, gradient.device)
        if bucket and (not alike or held + gradient.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, held = [], 0
        bucket.append(gradient)
        held += gradient.nbytes
    if bucket:
        yield bucket


def _make_room(buckets: Sequence[Sequence[Tensor]]) -> dict[Any, Tensor]:
    """Return one flat buffer for each dtype and device; a bucket of a single gradient needs none."""
    most: dict[Any, int] = {}
    for bucket in buckets:
        if len(bucket) > 1 or not bucket[0].is_contiguous():
            key = (bucket[0].dtype, bucket[0].device)
            most[key] = max(most.get(key, 0), sum(gradient.numel() for gradient in bucket))
    return {key: torch.empty(number, dtype=key[0], device=key[1]) for key, number in most.items()}


def _reduce_bucket(bucket: Sequence[Tensor], room: dict[Any, Tensor], num_ranks: int, group: Any) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        bucket[0].div_(num_ranks)
        dist.all_reduce(bucket[0], group=group)
        return
    flat, start, places = room[(bucket[0].dtype, bucket[0].device)], 0, []
    for gradient in bucket:
        place = flat[start : start + gradient.numel()].view(gradient.shape)
        place.copy_(gradient)
        places.append(place)
        start += gradient.numel()
    flat[:start].div_(num_ranks)
    dist.all_reduce(flat[:start], group=group)
    for gradient, place in zip(bucket, places, strict=True):
        gradient.copy_(place)

"""Exact accumulation for losses with in-batch negatives, in two passes.

Source: Gao, Zhang, Han, Callan 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup,
arXiv:2101.06983, section 3.2 (GradCache).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brim.errors import InvalidInput
from brim.losses.measure import refuse_batch_norm
from brim.runtime.accumulate import Inputs, reducing, split_batch
from brim.runtime.ranks import gather_numbers, is_distributed

Encode = Callable[[Inputs], "Tensor | tuple[Tensor, ...]"]


@dataclass(slots=True, kw_only=True)
class _Piece:
    """One micro-batch of one encoder, between its two passes."""

    encode: Encode
    inputs: Inputs
    random: Any = None
    """State of the random generators before the first pass."""
    embeddings: tuple[Tensor, ...] = ()
    """What the first pass gave, without a graph."""
    gradients: tuple[Tensor, ...] = ()
    """Gradient of the loss with respect to each of them."""

    def run_first(self) -> None:
        """Encode without a graph, and remember the random state."""
        self.random = _read_random()
        with torch.no_grad():
            self.embeddings = _as_tuple(self.encode(self.inputs))

    def run_second(self) -> Tensor:
        """Encode again with the same dropout; return a number whose gradient is that of the loss."""
        kept = _read_random()
        _set_random(self.random)
        outputs = _as_tuple(self.encode(self.inputs))
        _set_random(kept)
        products = [(out * grad.to(out.dtype)).sum() for out, grad in zip(outputs, self.gradients, strict=True)]
        return torch.stack([product.float() for product in products]).sum()


def accumulate_contrastive(
    batch: Inputs | Sequence[Inputs], micro_batch_size: int | Sequence[int], *, model: nn.Module | Sequence[nn.Module],
    encode: Encode | Sequence[Encode], loss: Callable[..., Tensor], scaler: Any = None, group: Any = None,
) -> Tensor:  # fmt: skip
    """Run backward of a loss that looks across the whole batch, a micro-batch at a time; return that loss.

        loss = brim.accumulate_contrastive(
            [queries, passages], 8, model=model, encode=lambda inputs: model(**inputs).pooler_output, loss=info_nce,
        )
        optimizer.step()
        optimizer.zero_grad()

    Every micro-batch is encoded without a graph, the loss is taken of all embeddings together, and every micro-batch is
    encoded again to run backward from its embeddings' gradients: the price is one more forward pass. Dropout draws the
    same in both. Among several ranks the loss sees the embeddings of all of them, in rank order, and the average over
    ranks (DDP, FSDP) is the gradient of that loss. Ranks may hold different numbers of sequences.

    Leaves out: auxiliary losses inside the encoders (a router's balance); gradient penalties.

    Args:
        batch: inputs of the encoder, rows first; a list of such where rows of several encoders meet in the loss.
        micro_batch_size: rows per micro-batch; one number for each encoder where they differ.
        model: the trained module or modules, wrapped or not; parameters that the loss uses itself, such as a
            temperature, are found among theirs.
        encode: returns the embeddings of a micro-batch, one row per sequence, or a tuple of such (text and image). A
            list where each encoder has its own; one function otherwise.
        loss: takes all embeddings, those of the first encoder first; returns the loss of the batch.
        scaler: a `torch.amp.GradScaler`.
        group: data-parallel process group; the default one if None.

    Raises:
        InvalidInput: a micro-batch size that does not go with the batch, embeddings without rows.
        InseparableLoss: an encoder has batch-norm layers in training mode.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    for one in models:
        refuse_batch_norm(one)
    columns = _cut_columns(batch, micro_batch_size, encode)
    for piece in _flatten(columns):
        piece.run_first()
    value, own = _find_gradients(columns, models, loss, group)
    _run_backward(columns, models, own, scaler)
    return value


def _cut_columns(batch: Any, size: int | Sequence[int], encode: Any) -> list[list[_Piece]]:
    """Return the micro-batches of each encoder."""
    batches = [batch] if isinstance(batch, Mapping) else list(batch)
    sizes = [size] * len(batches) if isinstance(size, int) else list(size)
    encoders = [encode] * len(batches) if callable(encode) else list(encode)
    if not len(batches) == len(sizes) == len(encoders):
        raise InvalidInput(f"{len(batches)} batches, {len(sizes)} micro-batch sizes and {len(encoders)} encoders")
    return [
        [_Piece(encode=one, inputs=inputs) for inputs in split_batch(rows, per)]
        for rows, per, one in zip(batches, sizes, encoders, strict=True)
    ]


def _flatten(columns: Sequence[Sequence[_Piece]]) -> Iterator[_Piece]:
    return (piece for column in columns for piece in column)


def _find_gradients(
    columns: Sequence[Sequence[_Piece]], models: Sequence[nn.Module], loss: Callable[..., Tensor], group: Any
) -> tuple[Tensor, list[tuple[nn.Parameter, Tensor]]]:
    """Give each piece its embeddings' gradients; return the loss, and gradients of parameters that it uses itself.

    Every rank takes the loss of all embeddings, so the gradient of its own is whole; times the number of ranks, since
    gradients are averaged over them. Those of the loss's own parameters are the same on every rank already.
    """
    mine, everyone, num_ranks = [], [], 1
    for column in columns:
        for parts in zip(*(piece.embeddings for piece in column), strict=True):
            leaf = torch.cat(parts).requires_grad_()
            gathered, num_ranks = _gather(leaf, group)
            mine.append(leaf)
            everyone.append(gathered)
    trained = list({id(p): p for one in models for p in one.parameters() if p.requires_grad}.values())
    with torch.enable_grad():
        value = loss(*everyone)
        found = torch.autograd.grad(value, [*mine, *trained], allow_unused=True)
    _share_out(columns, [torch.zeros_like(leaf) if grad is None else grad * num_ranks
                         for leaf, grad in zip(mine, found[: len(mine)], strict=True)])  # fmt: skip
    own = zip(trained, found[len(mine) :], strict=True)
    return value.detach(), [(parameter, grad) for parameter, grad in own if grad is not None]


def _share_out(columns: Sequence[Sequence[_Piece]], gradients: list[Tensor]) -> None:
    for column in columns:
        sizes = [len(piece.embeddings[0]) for piece in column]
        here = [gradients.pop(0).split(sizes) for _ in column[0].embeddings]
        for piece, parts in zip(column, zip(*here, strict=True), strict=True):
            piece.gradients, piece.embeddings = parts, ()


def _gather(leaf: Tensor, group: Any) -> tuple[Tensor, int]:
    """Return the embeddings of every rank, one's own with their graph, and the number of ranks."""
    if not is_distributed():
        return leaf, 1
    sizes = [int(row[0]) for row in gather_numbers((len(leaf),), leaf.device, group)]
    padded = leaf.detach().new_zeros((max(sizes), *leaf.shape[1:]))
    padded[: len(leaf)] = leaf.detach()
    blocks = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(blocks, padded, group=group)
    parts = [block[:size] for block, size in zip(blocks, sizes, strict=True)]
    parts[dist.get_rank(group)] = leaf
    return torch.cat(parts), len(sizes)


def _run_backward(
    columns: Sequence[Sequence[_Piece]], models: Sequence[nn.Module], own: Sequence[tuple[nn.Parameter, Tensor]],
    scaler: Any,
) -> None:  # fmt: skip
    """Run the second pass. The last micro-batches of all encoders go together, so that every parameter is reduced."""
    for piece in (piece for column in columns for piece in column[:-1]):
        with _reducing_all(models, False):
            _back(piece.run_second(), scaler)
    with _reducing_all(models, True):
        shares = [column[-1].run_second() for column in columns]
        shares += [(parameter * grad).sum().float() for parameter, grad in own]
        _back(torch.stack(shares).sum(), scaler)


def _back(share: Tensor, scaler: Any) -> None:
    (share if scaler is None else scaler.scale(share)).backward()


@contextmanager
def _reducing_all(models: Sequence[nn.Module], reduces: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(reducing(model, reduces))
        yield


def _as_tuple(found: Any) -> tuple[Tensor, ...]:
    outputs = (found,) if isinstance(found, Tensor) else tuple(found)
    if not all(isinstance(out, Tensor) and out.dim() for out in outputs):
        raise InvalidInput("encode must return embeddings with one row per sequence, or a tuple of such")
    return outputs


def _read_random() -> tuple[Tensor, Tensor | None]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None


def _set_random(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])

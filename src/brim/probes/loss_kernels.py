"""Loss kernels of other projects as autograd functions that allocate what the kernels allocate, line by line.

A Triton kernel writes into tensors its Python side has made. Only that side is repeated here, so losses are not
computed: what comes out has the right shapes and dtypes and arbitrary values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

IGNORED = -100
TILE_TOKENS, TILE_VOCABULARY = 4_096, 32_768
"""Source: trl/kernels/chunked_logprob.py TOKEN_CHUNK_SIZE; trl/trainer/utils.py _CHUNKED_LOGPROB_CHUNK_SIZE (1.16)."""
_BUFFER_BYTES = 2 * 2**30
"""Source: unsloth_zoo fused_losses/fused_linear.py _CHUNK_GB, the most it takes of what is free."""
_LEAST_LOGITS, _LEAST_ROWS, _MOST_ROWS = 512 * 151_936, 512, 4_096
"""Source: unsloth_zoo fused_losses/fused_linear.py _MIN_LOGITS, fused_linear_rows, _MAX_ROWS."""


class InPlaceCrossEntropy(torch.autograd.Function):
    """Cross-entropy that keeps the logits it is given and writes their gradient over them.

    Source: fms-acceleration fms_acceleration_foak kernels/unsloth/cross_entropy_loss.py Fast_CrossEntropyLoss;
    Liger-Kernel ops/cross_entropy.py keeps the same, less the log-sum-exp.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of each row, fp32."""
        losses = torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
        ctx.save_for_backward(logits, torch.empty_like(losses), labels)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the logits' own storage as their gradient."""
        return ctx.saved_tensors[0], None


class ScoredPositions(torch.autograd.Function):
    """`hidden[mask]` where the mask is true everywhere, without asking it.

    Source: aten/src/ATen/native/IndexingUtils.h expandTensors (a mask becomes its nonzero positions);
    tools/autograd/derivatives.yaml index.Tensor; native/cuda/Indexing.cu index_put_with_sort_kernel (three sorted
    copies of the positions).
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the scored rows of `hidden` (batch, length, width) as a copy (batch x length, width)."""
        ctx.shape, ctx.mask = hidden.shape, mask
        positions = mask.new_empty((mask.numel(), 2), dtype=torch.long)
        rows = hidden.new_empty((mask.numel(), hidden.shape[-1]))
        del positions
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient spread over all positions."""
        gradient = gradients[0].new_zeros(ctx.shape)
        positions = ctx.mask.new_empty((ctx.mask.numel(), 2 + 3), dtype=torch.long)
        del positions
        return gradient, None


def _tiles(num_tokens: int, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    for first in range(0, num_tokens, TILE_TOKENS):
        for start in range(0, vocabulary, TILE_VOCABULARY):
            yield (
                slice(first, min(first + TILE_TOKENS, num_tokens)),
                slice(start, min(start + TILE_VOCABULARY, vocabulary)),
            )


class ChunkedLogProb(torch.autograd.Function):
    """TRL's log-probabilities of labels: logits in tiles, recomputed in the backward pass; gradients sum in fp32.

    Source: trl/kernels/chunked_logprob.py ChunkedLogProbFunction (1.16), as it runs on a card. The tile is as wide
    as `TILE_VOCABULARY` whatever the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return log-probabilities, entropies and whether the label is the likeliest, one of each per row."""
        ctx.set_materialize_grads(False)
        count, dtype = hidden.shape[0], _compute_dtype(hidden)
        sums = [hidden.new_zeros(count, dtype=torch.float32) for _ in range(7)]
        tile = hidden.new_empty((min(count, TILE_TOKENS), TILE_VOCABULARY), dtype=dtype)
        for tokens, words in _tiles(count, weight.shape[0]):
            part = hidden[tokens].to(dtype)
            weight[words].to(dtype)  # cast, multiplied and dropped; the product goes into the tile
        normaliser = sums[0] + torch.log(sums[1])
        log_probs = sums[6] - normaliser
        entropy = normaliser - sums[2] / sums[1]
        likeliest = (sums[6] >= sums[0]) & (sums[6] > sums[5])
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy)
        ctx.dtype = dtype
        ctx.mark_non_differentiable(likeliest)
        del part, tile
        return log_probs, entropy, likeliest

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients in the dtypes of what they belong to, each summed in fp32 first."""
        hidden, weight, bias, *_ = ctx.saved_tensors
        given, sums = (hidden, weight, bias), []
        for one, needed in zip(given, ctx.needs_input_grad, strict=False):
            sums.append(torch.zeros_like(one, dtype=torch.float32) if needed else None)
        tile = hidden.new_empty((min(hidden.shape[0], TILE_TOKENS), TILE_VOCABULARY), dtype=ctx.dtype)
        for tokens, words in _tiles(hidden.shape[0], weight.shape[0]):
            part = hidden[tokens].to(ctx.dtype)
            cast = weight[words].to(ctx.dtype)  # the one before lives until this one is made
        narrow = [None if one is None else one.to(like.dtype) for one, like in zip(sums, given, strict=True)]
        del part, cast, tile
        return *narrow, None


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tensor.dtype


class LigerLinearCrossEntropy(torch.autograd.Function):
    """Output matrix and cross-entropy in one: gradients are made in the forward pass, logits never stored.

    Source: Liger-Kernel 0.8.5 ops/fused_linear_cross_entropy.py fused_linear_cross_entropy_forward: as many chunks as
    the vocabulary is times wider than the hidden size, rounded; one buffer of logits where no cast is needed.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[misc]
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss; `hidden` is (tokens, width)."""
        chunks = liger_chunks(hidden.shape, weight.shape)
        gradient = torch.zeros_like(hidden)
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        losses = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        scored = labels != IGNORED
        plain = hidden.dtype == weight.dtype == _compute_dtype(hidden)
        buffer = hidden.new_empty((chunks[0].stop, weight.shape[0])) if plain else None
        for chunk in chunks:
            logits = hidden[chunk] @ weight.t() if buffer is None else buffer
            if buffer is None:
                gradient[chunk] = logits @ weight
            del logits
        del buffer, scored
        ctx.save_for_backward(gradient, weight_gradient)
        return torch.sum(losses)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[misc]
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return what the forward pass made, scaled in place."""
        return *ctx.saved_tensors, None


class OldLigerLinearCrossEntropy(torch.autograd.Function):
    """The same before Liger 0.4: every chunk's logits cast to fp32, back, and scaled, each a tensor.

    Source: fms-acceleration fms_acceleration_foak fused_ops/liger_ce/fused_linear_cross_entropy_loss.py.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss; `hidden` is (tokens, width)."""
        dtype = _compute_dtype(hidden)
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        gradient = torch.zeros_like(hidden)
        losses = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        for chunk in liger_chunks(hidden.shape, weight.shape):
            logits = hidden[chunk] @ weight.t()
            logits = logits.float()
            logits = logits.to(dtype)
            scaled = logits * 0.5
            gradient[chunk] = scaled @ weight
        ctx.save_for_backward(gradient, weight_gradient)
        return torch.sum(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return what the forward pass made, scaled in place."""
        return *ctx.saved_tensors, None


def liger_chunks(hidden: torch.Size, weight: torch.Size) -> list[slice]:
    """Return the rows of each chunk.

    Source: Liger-Kernel ops/fused_linear_cross_entropy.py inc_factor, chunk_size, num_chunks.
    """
    factor = -(-weight[0] // hidden[1])
    size = min(1 << (-(-hidden[0] // factor) - 1).bit_length(), hidden[0])
    return [slice(start, min(start + size, hidden[0])) for start in range(0, hidden[0], size)]


class UnslothLinearCrossEntropy(torch.autograd.Function):
    """Unsloth's form of the same: one buffer of fp32 logits, and gradients that the backward pass copies scaled.

    Source: unsloth_zoo 2026.10 fused_losses/fused_linear.py _ce_impl, fused_linear_rows, _ce_backward.
    Leaves out: the tiled form it takes over a frozen head from 4,096 tokens, whose buffer is smaller.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss; `hidden` is (tokens, width)."""
        dtype, (count, width), vocabulary = _compute_dtype(hidden), hidden.shape, weight.shape[0]
        gradient = torch.zeros_like(hidden)
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        losses = hidden.new_empty(count, dtype=torch.float32)
        rows, cast = unsloth_rows(count, width, vocabulary), weight.to(dtype)
        buffer = hidden.new_empty((rows, -(-vocabulary // 8) * 8), dtype=torch.float32)
        for start in range(0, count, rows):
            part = hidden[start : start + rows].to(dtype)
            product = torch.empty_like(part, dtype=torch.float32)
            del part, product
        del buffer, cast
        ctx.save_for_backward(gradient, weight_gradient)
        return losses.double().sum().float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return scaled copies of what the forward pass made."""
        scaled = [None if one is None else torch.empty_like(one) for one in ctx.saved_tensors]
        return *scaled, None


def unsloth_rows(count: int, width: int, vocabulary: int) -> int:
    """Return the rows of its buffer of logits.

    Source: unsloth_zoo fused_losses/fused_linear.py fused_linear_rows.
    """
    least = min(max(_power_below(_LEAST_LOGITS / vocabulary), _LEAST_ROWS), _MOST_ROWS)
    rows = min(max(_power_below(count * width / vocabulary), least), _MOST_ROWS)
    return max(min(rows, _BUFFER_BYTES // (4 * vocabulary), count), 1)


def _power_below(value: float) -> int:
    return 1 << max(math.floor(math.log2(max(value, 1))), 0)

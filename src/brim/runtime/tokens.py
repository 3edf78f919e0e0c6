"""How many tokens a micro-batch holds, and how many of them are padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_IDS, _EMBEDS, _MASK = "input_ids", "inputs_embeds", "attention_mask"


@dataclass(frozen=True, slots=True)
class BatchTokens:
    """Tokens of one micro-batch."""

    rows: int
    """Rows, the longest of its inputs."""
    longest: int
    """Tokens of a row, padding included."""
    run: int
    """Tokens of all rows, padding included."""
    masks: tuple[Tensor, ...]
    """Masks whose sum are real tokens; where there are none, `unmasked` tells them."""
    unmasked: int
    """Tokens that no mask covers: all of them count as real."""


def count_tokens(inputs: Any) -> BatchTokens | None:
    """Return the tokens of a micro-batch; None where it has no token inputs (images, sound, lists of rows).

    Nothing is read from the device here: shapes are known to the host, masks are summed when somebody asks.

    Leaves out: labels of an encoder-decoder, which are tokens of the decoder; padding without a mask.
    """
    if not isinstance(inputs, Mapping):
        return None
    pairs = list(_list_inputs(inputs))
    if not pairs:
        return None
    rows, longest = max((shape for shape, _ in pairs), key=lambda shape: shape[0] * shape[1])
    masks = tuple(mask for _, mask in pairs if mask is not None)
    unmasked = sum(shape[0] * shape[1] for shape, mask in pairs if mask is None)
    run = sum(shape[0] * shape[1] for shape, _ in pairs)
    return BatchTokens(rows=rows, longest=longest, run=run, masks=masks, unmasked=unmasked)


def _list_inputs(inputs: Mapping[str, Any]) -> Iterator[tuple[tuple[int, int], Tensor | None]]:
    """Yield rows and length of each token input, and its mask: `chosen_input_ids` goes with `chosen_attention_mask`."""
    for key, value in inputs.items():
        stem = next((key.removesuffix(end) for end in (_IDS, _EMBEDS) if key.endswith(end)), None)
        if stem is None or not isinstance(value, Tensor) or value.dim() < 2:
            continue
        shape = (int(value.shape[0]), int(value.shape[1]))
        mask = inputs.get(stem + _MASK)
        fits = isinstance(mask, Tensor) and tuple(mask.shape) == shape
        yield shape, mask if fits else None

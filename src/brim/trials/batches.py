"""Worst-case micro-batches: every sequence as long as planned, no padding in it, tokens from all of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from brim.probes.inputs import MakeInputs

_TOKENS = ("input_ids", "decoder_input_ids", "labels")
_MEDIA = ("pixel_values", "input_features", "input_values", "pixel_values_videos")


def fill_tokens(make_inputs: MakeInputs, vocab_size: int, special: frozenset[int]) -> MakeInputs:
    """Return a maker of the same micro-batches with random tokens, each a target where the model predicts tokens.

    Text around images and sound stays as it is, because placeholders stand in it.

    Args:
        make_inputs: returns a micro-batch of full sequences.
        vocab_size: size of the vocabulary.
        special: tokens that are none of the text: padding, begin, end.
    """
    allowed = torch.tensor([token for token in range(vocab_size) if token not in special])

    def draw(like: torch.Tensor) -> torch.Tensor:
        return allowed[torch.randint(len(allowed), like.shape)]

    def make() -> Mapping[str, torch.Tensor]:
        inputs = dict(make_inputs())
        if any(name in inputs for name in _MEDIA) or "input_ids" not in inputs or not len(allowed):
            return inputs
        tokens = draw(inputs["input_ids"])
        whole = {
            name: tokens if one.shape == tokens.shape else draw(one) for name, one in inputs.items()
            if name in _TOKENS and isinstance(one, torch.Tensor) and one.dim() > 1
        }  # fmt: skip
        return inputs | whole | {"input_ids": tokens}

    return make


def list_special(config: Any) -> frozenset[int]:
    """Return the token ids that a model's config gives a meaning of their own."""
    found: set[int] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"):
        value = getattr(config, name, None)
        found |= set(value) if isinstance(value, (list, tuple)) else {value} if isinstance(value, int) else set()
    return frozenset(found)


def count_real(inputs: Mapping[str, Any]) -> float:
    """Return the share of a micro-batch's tokens that its mask calls real; 1 without a mask."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or not mask.numel():
        return 1.0
    return float(mask.ne(0).sum()) / mask.numel()

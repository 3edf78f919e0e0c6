"""Counting rules: how many terms the loss of a micro-batch averages over, read from its inputs alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Label that no loss counts. Source: torch.nn.functional.cross_entropy, `ignore_index`."""

_TARGETS = ("label", "target")
_MASKS = ("completion_mask", "loss_mask", "shift_loss_mask")
_ROWS = ("labels", "input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "input_values")


@dataclass(frozen=True, slots=True, kw_only=True)
class CountingRule:
    """How many terms a mean has, as a function of the inputs of a model."""

    key: str | None = None
    """Input that says which positions count; None counts rows (sequences)."""
    shifted: bool = False
    """Whether position 0 of each row is left out, since nothing predicts it."""
    ignored: int = IGNORED
    """Value of the input that does not count; a mask has 0."""

    def count(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the number of terms of one micro-batch as an integer tensor without dimensions.

        Raises:
            KeyError: the input that the rule reads is missing.
        """
        if self.key is None:
            return torch.tensor(count_rows(inputs))
        return self._read(inputs).ne(self.ignored).sum()

    def add_term(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs in which one position counts.

        A mean over nothing is not a number, and stays none when multiplied by 0; the caller gives such a micro-batch
        the weight 0.
        """
        patched = dict(inputs)
        if self.key is not None:
            patched[self.key] = filled = inputs[self.key].clone()
            value = 1 if self.ignored == 0 else 0
            filled[(0,) if filled.dim() == 1 else (0, -1)] = value
        return patched

    def __str__(self) -> str:
        if self.key is None:
            return "rows"
        place = f"{self.key}[..., 1:]" if self.shifted else self.key
        return f"{place} != {self.ignored}"

    def _read(self, inputs: Mapping[str, Any]) -> Tensor:
        values = inputs[self.key or ""]
        return values[..., 1:] if self.shifted else values


ROWS = CountingRule()


def count_rows(inputs: Mapping[str, Any]) -> int:
    """Return how many rows a micro-batch has: the first dimension of its labels, or of what stands for them."""
    named = [inputs[key] for key in _ROWS if isinstance(inputs.get(key), Tensor)]
    tensors = [value for value in (*named, *inputs.values()) if isinstance(value, Tensor) and value.dim()]
    return tensors[0].shape[0] if tensors else 1


def list_rules(inputs: Mapping[str, Any], ignored: tuple[int, ...] = ()) -> Iterator[CountingRule]:
    """Yield every rule that these inputs allow, the likeliest first.

    Args:
        inputs: one micro-batch as keyword arguments of the model.
        ignored: values beside -100 that a loss was seen to leave out.
    """
    single = []
    for key, value in inputs.items():
        if is_target(key, value):
            for leave_out in dict.fromkeys((IGNORED, *ignored)):
                if value.dim() == 1 and leave_out != IGNORED:
                    single.append(CountingRule(key=key, ignored=leave_out))
                else:
                    yield from _both_ways(key, value, leave_out)
        elif key in _MASKS and isinstance(value, Tensor):
            yield from _both_ways(key, value, 0)
    yield ROWS
    # a span's loss ignores the length that this batch is padded to: no rule for the next one, if rows do as well
    yield from single


def list_masks(inputs: Mapping[str, Any]) -> Iterator[CountingRule]:
    """Yield the rule that counts the tokens which attention sees, where the inputs tell them from padding."""
    value = inputs.get("attention_mask")
    if isinstance(value, Tensor) and value.dim() == 2:
        yield CountingRule(key="attention_mask", ignored=0)


def is_target(key: str, value: object) -> bool:
    """Return whether an input holds whole-numbered targets."""
    whole = isinstance(value, Tensor) and value.dim() and not (value.is_floating_point() or value.dtype == torch.bool)
    return bool(whole) and any(word in key for word in _TARGETS)


def _both_ways(key: str, value: Tensor, ignored: int) -> Iterator[CountingRule]:
    if value.dim() > 1:
        yield CountingRule(key=key, shifted=True, ignored=ignored)
    yield CountingRule(key=key, ignored=ignored)

"""Sequences made up for a model class: uneven lengths and label counts, prompts, one sequence without any target."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from brim.losses.rules import IGNORED

VOCABULARY = 96
TOKENS = (3, 60)
"""Made-up tokens: clear of special ones at both ends."""
_SHORTEST, _LONGEST = 6, 40


def make_rows(
    architecture: str, config: Any, number: int, *, seed: int = 0, equal_lengths: bool = False
) -> list[dict[str, Tensor]]:
    """Return sequences that a class of transformers can be trained on.

    A third trains on every token, the others on what follows a prompt; the fourth has no target at all, as happens when
    a prompt fills the length.

    Args:
        architecture: class name, such as `LlamaForCausalLM`; what follows `For` says what the labels are.
        config: the small model's config.
        number: how many sequences.
        seed: of what is made up.
        equal_lengths: whether all are of one length, for a model that padding changes.
    """
    generator = torch.Generator().manual_seed(seed)
    head = architecture.rpartition("For")[2]
    makers = {
        "SequenceClassification": _row_label, "TokenClassification": _token_labels, "MaskedLM": _masked,
        "QuestionAnswering": _span, "ImageClassification": _image, "MultipleChoice": _choice, "CTC": _speech,
        "PreTraining": _pretraining if _takes(architecture, "next_sentence_label") else _replaced,
    }  # fmt: skip
    make = makers.get(head)
    if make is None:
        make = _speech_pair if hasattr(config, "num_mel_bins") else _pair if _is_pair(config) else _text
    if make is _row_label and hasattr(config, "conv_stride"):
        make = _sound
    shortest = _LONGEST - 1 if equal_lengths else _SHORTEST
    return [make(config, generator, index, shortest) for index in range(number)]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a micro-batch: rows padded to the longest on the right, labels with -100, everything else with 0."""
    batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        batch[key] = _pad(values, IGNORED if key == "labels" else 0) if values[0].dim() == 1 else torch.stack(values)
    return batch


def _pad(values: list[Tensor], filler: int) -> Tensor:
    longest = max(len(value) for value in values)
    return torch.stack([torch.cat([value, value.new_full((longest - len(value),), filler)]) for value in values])


def _takes(architecture: str, name: str) -> bool:
    """Return whether the forward pass of a class takes an input."""
    import transformers

    kind = getattr(transformers, architecture, None)
    return kind is not None and name in inspect.signature(kind.forward).parameters


def _is_pair(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def _tokens(generator: torch.Generator, length: int) -> Tensor:
    return torch.randint(*TOKENS, (length,), generator=generator)


def _length(generator: torch.Generator, shortest: int) -> int:
    return int(torch.randint(shortest, _LONGEST, (), generator=generator))


def _text(config: Any, generator: torch.Generator, index: int, shortest: int = _SHORTEST) -> dict[str, Tensor]:
    """Return one sequence of a causal language model."""
    tokens = _tokens(generator, _length(generator, shortest))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": _hide(tokens, index)}


def _hide(tokens: Tensor, index: int) -> Tensor:
    labels = tokens.clone()
    if index % 3:
        labels[: len(labels) // (2 + index % 2)] = IGNORED
    if index == 3:
        labels[:] = IGNORED
    return labels


def _pair(config: Any, generator: torch.Generator, index: int, shortest: int = _SHORTEST) -> dict[str, Tensor]:
    source, target = _tokens(generator, _length(generator, shortest)), _tokens(generator, _length(generator, shortest))
    if index == 3:
        target[:] = IGNORED
    return {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": target}


def _masked(config: Any, generator: torch.Generator, index: int, shortest: int = _SHORTEST) -> dict[str, Tensor]:
    """Return one sequence of a masked language model: a few positions are targets, position 0 among them at times."""
    row = _text(config, generator, index, shortest)
    chosen = torch.rand(len(row["input_ids"]), generator=generator) < (0.2 if index % 2 else 0.6)
    chosen[0] = bool(index % 2)
    labels = torch.where(chosen, row["input_ids"], torch.full_like(row["input_ids"], IGNORED))
    return {**row, "labels": labels if index != 3 else torch.full_like(labels, IGNORED)}


def _token_labels(config: Any, generator: torch.Generator, index: int, shortest: int = _SHORTEST) -> dict[str, Tensor]:
    row = _text(config, generator, index, shortest)
    kinds = torch.randint(0, config.num_labels, row["labels"].shape, generator=generator)
    return {**row, "labels": torch.where(row["labels"].eq(IGNORED), row["labels"], kinds)}


def _row_label(config: Any, generator: torch.Generator, index: int, shortest: int = _SHORTEST) -> dict[str, Tensor]:
    row = _text(config, generator, index, shortest)
    if config.num_labels == 1:
        return {**row, "labels": torch.rand((), generator=generator)}
    return {**row, "labels": torch.tensor(index % config.num_labels)}


def _span(config: Any, generator: torch.Generator, index: int, shortest: int = _SHORTEST) -> dict[str, Tensor]:
    row = _text(config, generator, index, shortest)
    del row["labels"]
    return {**row, "start_positions": torch.tensor(1), "end_positions": torch.tensor(2 + index % 3)}


def _replaced(config: Any, generator: torch.Generator, index: int, shortest: int = _SHORTEST) -> dict[str, Tensor]:
    """Return one sequence with, for each token, whether it was replaced; what is padding the mask says."""
    row = _text(config, generator, index, shortest)
    return {**row, "labels": torch.randint(0, 2, row["labels"].shape, generator=generator)}


def _pretraining(config: Any, generator: torch.Generator, index: int, shortest: int = _SHORTEST) -> dict[str, Tensor]:
    """Return one sequence with masked tokens and whether its second half follows the first."""
    return {**_masked(config, generator, index, shortest), "next_sentence_label": torch.tensor(index % 2)}


def _choice(config: Any, generator: torch.Generator, index: int, shortest: int = _SHORTEST) -> dict[str, Tensor]:
    tokens = torch.stack([_tokens(generator, _SHORTEST) for _ in range(3)])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.tensor(index % 3)}


def _image(config: Any, generator: torch.Generator, index: int, shortest: int = _SHORTEST) -> dict[str, Tensor]:
    size = getattr(config, "image_size", None) or 32
    pixels = torch.rand(getattr(config, "num_channels", 3), size, size, generator=generator)
    return {"pixel_values": pixels, "labels": torch.tensor(index % config.num_labels)}


def _sound(config: Any, generator: torch.Generator, index: int, shortest: int = _SHORTEST) -> dict[str, Tensor]:
    return {
        "input_values": torch.rand(1600, generator=generator), "labels": torch.tensor(index % config.num_labels)
    }  # fmt: skip


def _speech(config: Any, generator: torch.Generator, index: int, shortest: int = _SHORTEST) -> dict[str, Tensor]:
    return {
        "input_values": torch.rand(1600, generator=generator),
        "labels": torch.randint(1, 20, (2 + index % 2,), generator=generator),
    }


def _speech_pair(config: Any, generator: torch.Generator, index: int, shortest: int = _SHORTEST) -> dict[str, Tensor]:
    frames = 2 * getattr(config, "max_source_positions", 100)
    features = torch.rand(config.num_mel_bins, frames, generator=generator)
    return {"input_features": features, "labels": _pair(config, generator, index, shortest)["labels"]}

"""One micro-batch as the model's forward takes it, whatever it reads: text, images, sound.

What a forward takes is read from its signature and the config; how many tokens an image or a sound becomes is asked
of the model itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import torch

from brim.cost.setting import is_masked
from brim.errors import ProbeFailed
from brim.probes.boxes import make_targets, reads_targets
from brim.probes.media import add_media, find_dtype, find_size, place_media
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

MakeInputs = Callable[[], Mapping[str, torch.Tensor]]
Make = Callable[[], torch.Tensor]

_PER_SEQUENCE = (
    "ForSequenceClassification", "ForImageClassification", "ForVideoClassification", "ForAudioClassification",
    "ForNextSentencePrediction", "ForMultipleChoice", "ForImageClassificationWithTeacher",
)  # fmt: skip
_CHOICES = 2
_UNTRACED = {
    "UniversalSegmentation": "its loss matches masks with scipy on the host",
    "InstanceSegmentation": "its loss matches masks with scipy on the host",
    "ForSegmentation": "its loss matches masks with scipy on the host",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of the inputs."""

    model: Any
    """The model below any adapter."""
    batch: int
    """Sequences per micro-batch."""
    length: int
    """Tokens per sequence."""
    masked: bool
    """Whether an attention mask is given."""

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def takes(self) -> frozenset[str]:
        """Names of the forward's arguments."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    @property
    def kind(self) -> str:
        """Class that is trained."""
        return type(self.model).__name__


def plan_lengths(
    workload: Workload, strategy: Strategy, model: torch.nn.Module, lengths: Sequence[int]
) -> MakeInputs:
    """Return a maker of micro-batches of these lengths in turn, over and over.

    Raises:
        ProbeFailed: the model takes something brim cannot make up.
    """
    makers = {
        length: plan_inputs(replace(workload, data=replace(workload.data, seq_len=length)), strategy, model)
        for length in dict.fromkeys(lengths)
    }
    turns = cycle(lengths)
    return lambda: makers[next(turns)]()


def plan_inputs(workload: Workload, strategy: Strategy, model: torch.nn.Module) -> MakeInputs:
    """Return a maker of micro-batches of full sequences, labels included, and a mask where one reaches the model.

    An all-ones mask is dropped by transformers, so none is given unless sequences of different lengths meet. The
    decoder's sequences are as long as the encoder's.

    Raises:
        ProbeFailed: the model takes something brim cannot make up.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "config", None) is None:
        return _plain_tokens(strategy.micro_batch_size, workload.data.seq_len, is_masked(workload, strategy))
    request = Request(
        model=base, batch=strategy.micro_batch_size, length=workload.data.seq_len, masked=is_masked(workload, strategy)
    )
    makers = _list_makers(request)

    def make() -> Mapping[str, torch.Tensor]:
        return {name: maker() for name, maker in makers.items()}

    return make


def _plain_tokens(batch: int, length: int, masked: bool) -> MakeInputs:
    def make() -> Mapping[str, torch.Tensor]:
        inputs = {name: torch.zeros(batch, length, dtype=torch.long) for name in ("input_ids", "labels")}
        return inputs | ({"attention_mask": torch.ones(batch, length, dtype=torch.long)} if masked else {})

    return make


def _list_makers(request: Request) -> dict[str, Make]:
    for word, reason in _UNTRACED.items():
        if request.kind.endswith(word):
            raise ProbeFailed(f"inputs of {request.kind}: {reason}; pass make_inputs", architecture=request.kind)
    makers: dict[str, Make] = {}
    media = add_media(request, makers)
    tokens_per_sequence = _length_of_text(request) if "input_ids" in request.takes or not makers else 0
    if tokens_per_sequence:
        makers |= _text(request, place_media(request, media, tokens_per_sequence))
    makers |= _targets(request, tokens_per_sequence)
    return makers


def _length_of_text(request: Request) -> int:
    """Return the sequence length, cut to what learnt positions of text allow where text is only the smaller part."""
    config = request.config
    if getattr(config, "text_config", None) is not None and request.kind.endswith("Model"):
        return min(request.length, getattr(config.text_config, "max_position_embeddings", request.length))
    return request.length


def _text(request: Request, ids: list[int]) -> dict[str, Make]:
    shape: tuple[int, ...] = (request.batch, len(ids))
    if request.kind.endswith("ForMultipleChoice"):
        shape = (request.batch, _CHOICES, len(ids))
    makers: dict[str, Make] = {"input_ids": lambda: torch.tensor(ids).expand(shape).contiguous()}
    if request.masked and "attention_mask" in request.takes:
        makers["attention_mask"] = lambda: torch.ones(shape, dtype=torch.long)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in request.takes and _wants_types(request, name):
            media = _find_media_ids(request.config)
            types = [int(one in media) for one in ids]
            makers[name] = lambda types=types: torch.tensor(types).expand(shape).contiguous()
    if "qformer_input_ids" in request.takes:  # the question again, as long as the query transformer's positions allow
        read = ids[: request.config.qformer_config.max_position_embeddings]
        makers["qformer_input_ids"] = lambda: torch.tensor(read).expand(shape[0], len(read)).contiguous()
    for name, value in _boxes(request).items():
        makers[name] = lambda value=value: torch.full((*shape, 4), value, dtype=torch.long)
    return makers


def _wants_types(request: Request, name: str) -> bool:
    return name == "mm_token_type_ids" or request.config.model_type.startswith(("gemma3", "paligemma", "colpali"))


def _boxes(request: Request) -> dict[str, int]:
    return {"bbox": 1} if "bbox" in request.takes else {}


def _find_media_ids(config: Any) -> frozenset[int]:
    names = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "audio_token_index")
    return frozenset(one for name in names if isinstance(one := getattr(config, name, None), int))


def _targets(request: Request, length: int) -> dict[str, Make]:
    """Return labels as the head's loss takes them."""
    batch, takes, kind = request.batch, request.takes, request.kind
    if kind.endswith("ForQuestionAnswering") and "start_positions" in takes:
        return {name: lambda: torch.zeros(batch, dtype=torch.long) for name in ("start_positions", "end_positions")}
    if "bool_masked_pos" in takes and kind.endswith(("ForMaskedImageModeling",)):
        count = _count_patches(request)
        return {"bool_masked_pos": lambda: torch.ones(batch, count, dtype=torch.bool)}
    if "return_loss" in takes:
        return {"return_loss": lambda: True}  # type: ignore[dict-item, return-value]
    if "labels" not in takes and "label" in takes:
        return {"label": lambda: torch.zeros(batch, dtype=torch.long)}
    if "labels" not in takes:
        return {}
    if reads_targets(request.model):
        dtype = find_dtype(request.model)
        return {"labels": lambda: make_targets(batch, dtype)}  # type: ignore[dict-item, return-value]
    shape = _label_shape(request, length)
    if kind.endswith(_PER_SEQUENCE) and getattr(request.config, "num_labels", 2) == 1:
        return {"labels": lambda: torch.zeros(shape)}
    made = {"labels": lambda: torch.ones(shape, dtype=torch.long)}
    if kind.endswith("ForPreTraining") and "next_sentence_label" in takes:
        made["next_sentence_label"] = lambda: torch.zeros(batch, dtype=torch.long)
    if kind.endswith("ForPreTraining") and "sentence_order_label" in takes:
        made["sentence_order_label"] = lambda: torch.zeros(batch, dtype=torch.long)
    return made


def _label_shape(request: Request, length: int) -> tuple[int, ...]:
    kind, batch = request.kind, request.batch
    if kind.endswith(_PER_SEQUENCE):
        return (batch,)
    if kind.endswith(("ForSemanticSegmentation", "ForDepthEstimation")):
        return (batch, *find_size(request.config))
    if kind.endswith("ForCTC"):
        return (batch, 8)
    return (batch, length or request.length)


def _count_patches(request: Request) -> int:
    config = request.config
    (height, width), patch = find_size(config), getattr(config, "patch_size", 16)
    patch = patch if isinstance(patch, int) else patch[0]
    return (height // patch) * (width // patch)

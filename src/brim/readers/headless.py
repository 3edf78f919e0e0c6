"""Checkpoints that name a class without a head, and so without a loss: what is trained has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brim.readers.hf_config import read_config
from brim.spec.model import ModelShape


def give_head(shape: ModelShape, config: Mapping[str, Any]) -> tuple[ModelShape, tuple[str, ...]]:
    """Return the shape that is trained, and a sentence if it has a head that the checkpoint does not name.

    Where the natural class has other layers (T5's for an encoder alone), or the formula does not know the
    architecture, the shape stays as it is.

    Source: transformers `models/*/modeling_*.py`: the forward of a class `...Model` takes no labels.
    """
    kind = shape.architecture
    if not shape.groups or not kind.endswith("Model") or "Head" in kind:
        return shape, ()
    natural = read_config({key: value for key, value in config.items() if key != "architectures"}, name=shape.name)
    if natural.groups != shape.groups:
        return shape, ()
    return natural, (f"{kind} has no loss; {natural.architecture} is trained",)

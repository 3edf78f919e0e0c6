"""The model of a config on the device, its weights random, loaded as a checkpoint would be: cast, quantised, placed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from brim.errors import ProbeFailed, first_line
from brim.probes.dtypes import torch_dtype
from brim.probes.model import find_class, make_config
from brim.spec.recipe import Dtype

_SCALE = 0.02
"""Standard deviation of random matrices: transformers' own `initializer_range` of most families."""


def load_random(
    config: Mapping[str, Any], architecture: str, dtype: Dtype, device: torch.device, loading: Mapping[str, Any]
) -> torch.nn.Module:
    """Return transformers' model of a config, loaded through `from_pretrained` from random weights.

    Args:
        config: as `config.json` has it.
        architecture: class of transformers.
        dtype: of the weights.
        device: where it goes.
        loading: further keywords of `from_pretrained`: attention, quantization.

    Raises:
        ProbeFailed: the installed transformers has no such class, or cannot build it.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kind = find_class(architecture)
    try:
        known = make_config(config)
        with torch.device("meta"):
            empty = kind._from_config(known, dtype=torch_dtype(dtype))
        model = kind.from_pretrained(
            None, config=known, state_dict=draw_weights(empty, device), dtype=torch_dtype(dtype),
            device_map={"": device}, **loading,
        )  # fmt: skip
    except Exception as error:  # whatever a model's own constructor or a quantiser raises
        raise ProbeFailed(f"{architecture} cannot be loaded from random weights: {first_line(error)}") from error
    model.config.use_cache = False
    return model


def draw_weights(empty: torch.nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """Return a checkpoint for a model on the meta device: random matrices, vectors of ones and zeros.

    On the way to a GPU every tensor is copied, so all may be parts of one drawn matrix: the host holds no second model.
    On a CPU they stay what the model computes with, and each is drawn.
    """
    shapes = empty.state_dict()
    shared = device.type != "cpu"
    most = max((one.numel() for one in shapes.values()), default=0)
    pool = torch.randn(most).mul_(_SCALE) if shared else torch.empty(0)
    return {name: _draw(name, one, pool if shared else None) for name, one in shapes.items()}


def _draw(name: str, like: torch.Tensor, pool: torch.Tensor | None) -> torch.Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    if like.ndim < 2:
        value = 1.0 if name.endswith("weight") else 0.0
        return torch.full(like.shape, value, dtype=like.dtype)
    drawn = torch.randn(like.shape).mul_(_SCALE) if pool is None else pool[: like.numel()].view(like.shape)
    return drawn.to(like.dtype)

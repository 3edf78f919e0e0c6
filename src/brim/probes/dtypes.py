"""brim's dtypes in PyTorch's words."""

from __future__ import annotations

import torch

from brim.spec.recipe import Dtype

_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(name: Dtype) -> torch.dtype:
    """Return PyTorch's name of one of brim's dtypes."""
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> Dtype | None:
    """Return brim's name of one of PyTorch's dtypes; None if it has none."""
    return next((name for name, one in _DTYPES.items() if one == dtype), None)

"""brim's dtypes in PyTorch's words."""

from __future__ import annotations

import torch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """Return PyTorch's name of one of brim's dtypes."""
    return _DTYPES[name]

"""The tape of dropout, and what dropout keeps before the first layer."""

from __future__ import annotations

from brim.cost.setting import Setting
from brim.cost.tape import ZERO, Size, Tape, Tensor, per_token
from brim.spec.model import ModelShape


def drop_out(tape: Tape, x: Tensor, width: int, fraction: float) -> Tensor:
    """Record dropout over `width` elements a token: a new tensor, and a boolean mask that is kept; nothing at 0.

    Source: aten/src/ATen/native/Dropout.cpp is_fused_kernel_acceptable, native/cuda/Dropout.cu native_dropout_cuda.
    """
    if not fraction:
        return x
    mask = tape.op("dropout mask", (), per_token(width), needs_grad=False)
    return tape.op("dropout", [x], x.size, saves=[mask])


def embedding_masks(shape: ModelShape, setting: Setting) -> Size:
    """Return the masks that every stack of text keeps of its embeddings, where a gradient flows to these."""
    keeps = setting.trains_base and setting.dropout.embedding_dropout
    return per_token(len(list_stacks(shape)) * shape.hidden_size) if keeps else ZERO


def list_stacks(shape: ModelShape) -> set[str]:
    """Return the stacks that have embeddings of their own: those of text, where there is text."""
    return {group.stack for group in shape.groups} - {"vision", "audio"} or {"vision"}

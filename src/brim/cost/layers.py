"""The tape of a layer: norms, attention, feed-forward and residual sums in the order the code runs them.

Read from transformers 5.23 models/*/modeling_*.py.
Leaves out: that Falcon drops both branches out at once, where it does at all (one byte per element of the stream).
"""

from __future__ import annotations

from dataclasses import replace

from brim.cost.attention import attend
from brim.cost.dropout_masks import drop_out
from brim.cost.experts import feed_experts
from brim.cost.feed_forward import feed_dense
from brim.cost.norms import normalise
from brim.cost.setting import Setting
from brim.cost.tape import Size, Tape, Tensor, per_token
from brim.spec.model import Attention, LayerGroup, Moe, NormKind


def record_layer(group: LayerGroup, setting: Setting) -> tuple[Tape, Tensor]:
    """Return the tape of one layer and its input (the residual stream)."""
    tape = Tape()
    stream = Tensor("layer input", per_token(group.hidden_size * stream_bytes(group.norm, setting)))
    if group.parallel:
        return _record_parallel(tape, group, setting, stream), stream
    state = _attend(tape, group, setting, stream, group.attention)
    if group.cross_attention is not None:
        state = _attend(tape, group, setting, state, group.cross_attention, crosses=True)
    _join(tape, group, setting, state, feed_forward(tape, group, setting, _enter(tape, group, setting, state)))
    return tape, stream


def stream_bytes(norm: NormKind, setting: Setting) -> int:
    """Return the bytes of an element between layers: of the residual stream, or what a norm after the sum makes of it.

    Source: aten/src/ATen/autocast_mode.h AT_FORALL_FP32: layer_norm answers in fp32 under autocast; bitsandbytes
    nn/modules.py Linear4bit.forward answers in its input's dtype, so that what a branch adds is fp32 then.
    """
    wide = norm == "layernorm" and setting.autocast
    follows = setting.quantization is not None and setting.quantization.kind in ("nf4", "fp4")
    return 4 if wide and (setting.code.norm_order == "after" or follows) else setting.residual_bytes


def _record_parallel(tape: Tape, group: LayerGroup, setting: Setting, stream: Tensor) -> Tape:
    normed = _norm(tape, group, setting, stream)
    attended = attend(tape, group.attention, setting, normed, group.norm)
    attended = drop_out(tape, attended, group.hidden_size, setting.dropout.hidden_dropout)
    second = _norm(tape, group, setting, stream) if group.num_norms > 1 else normed
    inner = feed_forward(tape, group, setting, second)
    inner = drop_out(tape, inner, group.hidden_size, setting.dropout.hidden_dropout)
    both = _add(tape, group, setting, inner, attended)
    _add(tape, group, setting, both, stream)
    return tape


def _attend(
    tape: Tape, group: LayerGroup, setting: Setting, state: Tensor, attention: Attention, *, crosses: bool = False
) -> Tensor:
    if group.cross_attention is not None and not crosses:
        setting = replace(setting, masked=False)  # collators pad a decoder's labels, and mask its encoder's input only
    inner = attend(tape, attention, setting, _enter(tape, group, setting, state), group.norm, crosses=crosses)
    return _join(tape, group, setting, state, inner)


def _enter(tape: Tape, group: LayerGroup, setting: Setting, state: Tensor) -> Tensor:
    """What a branch reads."""
    return _norm(tape, group, setting, state) if setting.code.norm_order == "before" else state


def _join(tape: Tape, group: LayerGroup, setting: Setting, state: Tensor, branch: Tensor) -> Tensor:
    """Add a branch to the residual stream, dropped out, with the normalisations around the sum."""
    branch = drop_out(tape, branch, group.hidden_size, setting.dropout.hidden_dropout)
    order, sandwiched = setting.code.norm_order, group.num_norms > 2 + (group.cross_attention is not None)
    if order == "branch" or (order == "before" and sandwiched):  # Gemma and GLM normalise branches before and after
        branch = _norm(tape, group, setting, branch)
    total = _add(tape, group, setting, state, branch)
    return _norm(tape, group, setting, total) if order == "after" else total


def _norm(tape: Tape, group: LayerGroup, setting: Setting, x: Tensor) -> Tensor:
    return normalise(tape, x, group.hidden_size, group.norm, setting)


def _add(tape: Tape, group: LayerGroup, setting: Setting, stream: Tensor, branch: Tensor) -> Tensor:
    size = max(stream.size.per_token, branch.size.per_token, group.hidden_size * setting.residual_bytes)
    return tape.op("residual", [stream, branch], per_token(size), passes_grad=True)


def feed_forward(tape: Tape, group: LayerGroup, setting: Setting, x: Tensor) -> Tensor:
    """Record the feed-forward block, dense or routed."""
    if isinstance(group.mlp, Moe):
        return feed_experts(tape, group.mlp, setting, x)
    return feed_dense(tape, group.mlp, setting, x)


def mask_bytes(setting: Setting) -> Size:
    """Return the bytes of the attention masks all layers share: for each kind, one row of `seq_len` per token.

    Source: transformers masking_utils.py: boolean for SDPA, additive in the stream's dtype for eager.
    """
    element = setting.residual_bytes if setting.attention == "eager" else 1
    return per_token(element * setting.attended_len * setting.num_masks)

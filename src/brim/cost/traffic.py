"""Bytes that cross the memory bus between matrix products: norms, rotary, activations, adapters, logits, casts.

Counted kernel by kernel from the code that runs: each kernel reads its inputs and writes its output once. Element
sizes: `c` bytes in matrix products, `r` bytes in the residual stream (4 after PEFT's upcast). Forward and backward
are separate, because checkpointing repeats the forward only.

Leaves out: what the second-level cache saves (tensors of a micro-batch are far larger), dropout of base models,
index and mask tensors (below 0.1 %).
"""

from __future__ import annotations

from typing import NamedTuple

from brim.cost.flops import active_adapters, attentions
from brim.cost.setting import DTYPE_BYTES, compute_bytes, residual_bytes
from brim.spec.model import Attention, LayerGroup, Mlp, ModelShape, Moe
from brim.spec.recipe import Recipe
from brim.spec.strategy import LayerKernels, LossKernel, Strategy

# Elements moved per element by activation functions written out in Python, forward and backward; others are one kernel.
_PYTHON_ACTIVATIONS = {"gelu_new": (18, 36), "gelu_fast": (18, 36), "gelu_python": (12, 24), "quick_gelu": (7, 12)}


class Bytes(NamedTuple):
    """Bytes read and written."""

    forward: float
    """In the forward pass."""
    backward: float
    """In the backward pass, recomputation aside."""

    def __add__(self, other: Bytes) -> Bytes:  # type: ignore[override]
        return Bytes(self.forward + other.forward, self.backward + other.backward)

    def times(self, factor: float) -> Bytes:
        """Return both, multiplied."""
        return Bytes(self.forward * factor, self.backward * factor)


class Widths(NamedTuple):
    """What decides traffic besides the shape."""

    c: int
    """Bytes of an element in matrix products."""
    r: int
    """Bytes of an element of the residual stream."""
    autocast: bool
    """Whether products cast their operands."""
    trains_base: bool
    """Whether the model's own weights train."""
    fused: bool
    """Whether norms, rotary and gated activations are single kernels."""
    layer_kernels: LayerKernels
    """Which fused kernels."""


def read_widths(recipe: Recipe, strategy: Strategy) -> Widths:
    """Return the element sizes and flags of a recipe under a strategy; compiling fuses as hand-written kernels do."""
    return Widths(
        c=compute_bytes(recipe), r=residual_bytes(recipe), autocast=recipe.autocast,
        trains_base=recipe.lora is None, fused=strategy.compile or strategy.layer_kernels != "none",
        layer_kernels=strategy.layer_kernels,
    )  # fmt: skip


def count_layer_bytes(group: LayerGroup, recipe: Recipe, widths: Widths) -> Bytes:
    """Return the bytes one token moves in one layer, attention scores and weights aside."""
    total = _norm(group.hidden_size, group.norm == "layernorm", widths).times(group.num_norms)
    total += Bytes(2 * widths.r + widths.c, 3 * widths.r).times(group.hidden_size * (2 + _crosses(group)))
    for attention in attentions(group):
        total += _around_attention(attention, recipe, widths)
    total += _feed_forward(group, widths) + _input_casts(group, widths)
    for linear, copies in active_adapters(group, recipe):
        total += _adapter(linear.in_features, linear.out_features, recipe, widths).times(copies)
    return total


def _crosses(group: LayerGroup) -> int:
    return 0 if group.cross_attention is None else 1


def _norm(width: int, is_layernorm: bool, widths: Widths) -> Bytes:
    """One normalisation. Written out (RMSNorm of transformers): to fp32, square, mean, product, back, times weight.

    Source: LlamaRMSNorm.forward and its autograd: fp32 kernels move 20 bytes an element forward (square 8, mean 4,
    product 8) and 68 backward (product 20, square 28, mean 8, sum 12); casts and the weight come on top.
    """
    r = widths.r
    if is_layernorm or widths.fused:
        return Bytes(2 * r, 3 * r).times(width)
    casts = 2 * (r + 4) if r != 4 else 0
    weight_gradient = 3 * r if widths.trains_base else 0
    return Bytes(20 + casts + 2 * r, 68 + casts + 2 * r + weight_gradient).times(width)


def _around_attention(attention: Attention, recipe: Recipe, widths: Widths) -> Bytes:
    """Rotary, head norms, repeated keys, and the kernel's own inputs and outputs.

    Source: apply_rotary_pos_emb (two products, a negated half, a concatenation, a sum: 10 elements moved per element,
    15 backward); flash attention backward reads q, k, v, o, do and writes dq (fp32), dk, dv.
    """
    c, turned = widths.c, attention.q_size + attention.k_size
    io = attention.q_size + attention.k_size + attention.v_size + attention.out_size
    total = Bytes(c, 2 * c).times(io) + Bytes(0, 4 * attention.q_size)
    if attention.rotary:
        total += (Bytes(2 * c, 2 * c) if widths.fused else Bytes(10 * c, 15 * c)).times(turned)
    if attention.qk_norm != "none":
        total += _norm(turned, False, widths)
    if recipe.engine.repeats_kv and attention.num_key_value_heads < attention.num_attention_heads:
        total += Bytes(c, c).times(attention.k_size + attention.v_size + attention.q_size + attention.out_size)
    return total


def count_score_bytes(attention: Attention, c: int) -> Bytes:
    """Return the bytes eager attention moves per (query, key) pair, all heads, masked pairs included.

    Forward: product, scale, mask, softmax in fp32, back to 16 bit, product. Backward: each once more, with two
    products each.

    Source: eager_attention_forward of transformers: writes c, scales 2c, adds a mask 3c, softmax c + 4, casts 4 + c,
    reads c; its autograd.
    """
    return Bytes(9 * c + 8, 10 * c + 20).times(attention.num_attention_heads)


def _feed_forward(group: LayerGroup, widths: Widths) -> Bytes:
    mlp = group.mlp
    if not isinstance(mlp, Moe):
        return _activation(mlp.intermediate_size, mlp.gated, mlp.hidden_act, widths)
    total = _experts(mlp, group.hidden_size, widths)
    return total + _activation_of(mlp.shared, widths) if mlp.shared is not None else total


def _activation_of(mlp: Mlp, widths: Widths) -> Bytes:
    return _activation(mlp.intermediate_size, mlp.gated, mlp.hidden_act, widths)


def _activation(width: int, gated: bool, hidden_act: str, widths: Widths) -> Bytes:
    """Activation, and its product with the other half where the block is gated; one kernel if fused."""
    if gated and widths.fused:
        return Bytes(3, 5).times(widths.c * width)
    plain = (2.0, 3.0) if widths.fused else _PYTHON_ACTIVATIONS.get(hidden_act, (2.0, 3.0))
    gate = Bytes(3, 6) if gated else Bytes(0, 0)
    return (Bytes(*plain) + gate).times(widths.c * width)


def _experts(moe: Moe, hidden_size: int, widths: Widths) -> Bytes:
    """Routing: gather tokens by expert, weigh, add back; and the experts' activations.

    Source: transformers integrations/moe.py: gather 2, weight product 2, sum into the stream 3 elements each.
    """
    visited = moe.num_experts_per_tok
    moved = Bytes(7, 14).times(widths.c * hidden_size * visited) + Bytes(24, 24).times(moe.num_experts)
    return moved + _activation(moe.intermediate_size * visited, True, moe.hidden_act, widths)


def _input_casts(group: LayerGroup, widths: Widths) -> Bytes:
    """Under autocast every product makes its own 16-bit copy of an fp32 input; only weights are cached."""
    if not widths.autocast or widths.r <= widths.c:
        return Bytes(0, 0)
    readers = sum(len(attention.linears) - 1 for attention in attentions(group))
    if not isinstance(group.mlp, Moe):
        readers += len(group.mlp.linears) - 1
    return Bytes(widths.r + widths.c, 2 * widths.r + widths.c).times(group.hidden_size * readers)


def _adapter(in_features: int, out_features: int, recipe: Recipe, widths: Widths) -> Bytes:
    """LoRA beside one matrix: the two thin products are pure traffic, and so are its casts, scale and sum.

    Source: peft 0.21 tuners/lora/layer.py Linear.forward: input cast to the adapter's dtype (and back under
    autocast), dropout, down, up, scale, sum; unsloth kernels/fast_lora.py adds in place and makes no copies.
    """
    c, lora = widths.c, recipe.lora
    if lora is None:
        return Bytes(0, 0)
    if widths.layer_kernels == "unsloth":
        return Bytes(c * (in_features + 2 * out_features), c * (3 * in_features + 2 * out_features))
    wide = DTYPE_BYTES[lora.dtype]
    casts = (2 if widths.autocast else 1) * (wide + c) if wide != c else 0
    dropout = 2 * c + 1 if lora.dropout else 0
    forward = (c + casts + dropout) * in_features + 6 * c * out_features
    return Bytes(forward, (5 * c + casts + dropout) * in_features + 4 * c * out_features)


def count_head_bytes(shape: ModelShape, recipe: Recipe, widths: Widths, loss: LossKernel) -> Bytes:
    """Return the bytes one token moves from the last layer to the loss and back.

    Dense: logits written, widened, log-softmax (read, write), and each gradient once; chunked and fused kernels read
    each chunk of 16-bit logits twice and write its gradient, a chunked one after computing it again.

    Source: transformers loss/loss_utils.py; trl 1.16 kernels/chunked_logprob.py; Liger fused_linear_cross_entropy.py.
    """
    norm = _norm(shape.hidden_size, shape.final_norm == "layernorm", widths)
    if not shape.head:
        return norm
    c, vocabulary = widths.c, shape.head[-1].out_features
    if loss != "dense":
        passes = Bytes(5 * c, c) if loss == "fused" else Bytes(3 * c, 5 * c)
        return norm + passes.times(vocabulary)
    wide = 4 if recipe.engine.upcasts_logits else c
    extra = (c + wide if wide != c else 0) + (2 * wide if recipe.engine.copies_shifted_logits else 0)
    capped = 6 * c if shape.logit_softcap else 0
    return norm + Bytes(c + extra + 2 * wide + capped, 2 * c + extra + 4 * wide + capped).times(vocabulary)

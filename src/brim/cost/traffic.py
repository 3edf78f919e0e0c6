"""Bytes that cross the memory bus between matrix products: norms, rotary, activations, adapters, logits, casts.

Counted kernel by kernel from the code that runs: each kernel reads its inputs and writes its output once. Element
sizes: `c` bytes in matrix products, `r` bytes in the residual stream (4 after PEFT's upcast), `w` bytes of what
products hand on. Forward and backward are separate, because checkpointing repeats the forward only.

Leaves out: what the second-level cache saves (tensors of a micro-batch are far larger), dropout of base models,
index and mask tensors (below 0.1 %).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from brim.cost.flops import active_adapters, active_linears, attentions
from brim.cost.setting import Setting, norm_is_fused, read_setting
from brim.spec.model import Attention, LayerGroup, Linear, Mlp, ModelShape, Moe, NormKind
from brim.spec.recipe import Recipe
from brim.spec.strategy import LossKernel, Strategy
from brim.spec.workload import Workload

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


def read_fusion(workload: Workload, strategy: Strategy) -> Setting:
    """Return the setting of a strategy; compiling fuses norms, rotary and gates as hand-written kernels do."""
    setting = read_setting(workload, strategy)
    return replace(setting, fused_norm=True, fused_rotary=True, fused_gate=True) if strategy.compile else setting


def _handed_on(setting: Setting) -> int:
    """Return the bytes of an element that products hand on: bitsandbytes casts back to the dtype of its input.

    Source: bitsandbytes nn/modules.py Linear4bit.forward (`.to(inp_dtype)`).
    """
    casts_back = setting.quantization is not None and setting.quantization.kind in ("nf4", "fp4", "int8")
    return max(setting.compute_bytes, setting.residual_bytes if casts_back else 0)


def count_layer_bytes(group: LayerGroup, recipe: Recipe, setting: Setting) -> Bytes:
    """Return the bytes one token moves in one layer, attention scores and weights aside."""
    c, r = setting.compute_bytes, setting.residual_bytes
    total = _norm(group.hidden_size, group.norm, setting).times(group.num_norms)
    total += Bytes(2 * r + c, 3 * r).times(group.hidden_size * (2 + _crosses(group)))
    for attention in attentions(group):
        total += _around_attention(attention, setting)
    total += _feed_forward(group, setting) + _shared_inputs(group, setting)
    for linear, copies in active_adapters(group, recipe):
        total += _adapter(linear.in_features, linear.out_features, setting).times(copies)
    return total


def _crosses(group: LayerGroup) -> int:
    return 0 if group.cross_attention is None else 1


def _norm(width: int, kind: NormKind, setting: Setting) -> Bytes:
    """One normalisation. Written out (RMSNorm of transformers): to fp32, square, mean, product, back, times weight.

    Source: LlamaRMSNorm.forward and its autograd: fp32 kernels move 20 bytes an element forward (square 8, mean 4,
    product 8) and 68 backward (product 20, square 28, mean 8, sum 12); casts and the weight come on top.
    """
    r = setting.residual_bytes
    if norm_is_fused(kind, setting):
        return Bytes(2 * r, 3 * r).times(width)
    casts = 2 * (r + 4) if r != 4 else 0
    weight_gradient = 3 * r if setting.trains_base else 0
    return Bytes(20 + casts + 2 * r, 68 + casts + 2 * r + weight_gradient).times(width)


def _around_attention(attention: Attention, setting: Setting) -> Bytes:
    """Rotary, head norms, repeated keys, and the kernel's own inputs and outputs.

    Source: apply_rotary_pos_emb (two products, a negated half, a concatenation, a sum: 10 elements moved per element,
    15 backward); flash attention backward reads q, k, v, o, do and writes dq (fp32), dk, dv.
    """
    c, w, turned = setting.compute_bytes, _handed_on(setting), attention.q_size + attention.k_size
    io = turned + attention.v_size + attention.out_size
    casts = c + w if w != c else 0
    total = Bytes(c + casts, 2 * c + casts).times(io) + Bytes(0, 4 * attention.q_size)
    if attention.rotary:
        total += (Bytes(2 * w, 2 * w) if setting.fused_rotary else Bytes(10 * w, 15 * w)).times(turned)
    if attention.qk_norm != "none":
        total += _norm(turned, "rmsnorm", setting)
    if setting.repeats_kv and attention.num_key_value_heads < attention.num_attention_heads:
        total += Bytes(w, w).times(io)
    return total


def count_score_bytes(attention: Attention, c: int) -> Bytes:
    """Return the bytes eager attention moves per (query, key) pair, all heads, masked pairs included.

    Forward: product, scale, mask, softmax in fp32, back to 16 bit, product. Backward: each once more, with two
    products each.

    Source: eager_attention_forward of transformers: writes c, scales 2c, adds a mask 3c, softmax c + 4, casts 4 + c,
    reads c; its autograd.
    """
    return Bytes(9 * c + 8, 10 * c + 20).times(attention.num_attention_heads)


def _feed_forward(group: LayerGroup, setting: Setting) -> Bytes:
    mlp = group.mlp
    if not isinstance(mlp, Moe):
        return _activation_of(mlp, setting)
    total = _experts(mlp, group.hidden_size, setting)
    return total + _activation_of(mlp.shared, setting) if mlp.shared is not None else total


def _activation_of(mlp: Mlp, setting: Setting) -> Bytes:
    return _activation(mlp.intermediate_size, mlp.gated, mlp.hidden_act, setting)


def _activation(width: int, gated: bool, hidden_act: str, setting: Setting) -> Bytes:
    """Activation, and its product with the other half where the block is gated; one kernel if fused."""
    if gated and setting.fused_gate:
        return Bytes(3, 5).times(_handed_on(setting) * width)
    gate = Bytes(3, 6) if gated else Bytes(0, 0)
    return (Bytes(*_PYTHON_ACTIVATIONS.get(hidden_act, (2, 3))) + gate).times(_handed_on(setting) * width)


def _experts(moe: Moe, hidden_size: int, setting: Setting) -> Bytes:
    """Routing: gather tokens by expert, weigh, add back; and the experts' activations.

    Source: transformers integrations/moe.py: gather 2, weight product 2, sum into the stream 3 elements each.
    """
    visited = moe.num_experts_per_tok
    moved = Bytes(7, 14).times(_handed_on(setting) * hidden_size * visited) + Bytes(24, 24).times(moe.num_experts)
    return moved + _activation(moe.intermediate_size * visited, True, moe.hidden_act, setting)


def _shared_inputs(group: LayerGroup, setting: Setting) -> Bytes:
    """Where several products read one tensor, autograd adds their gradients pair by pair; and under autocast every
    product makes its own 16-bit copy of an fp32 input (only weights are cached), and may hand on an fp32 output."""
    c, r, w = setting.compute_bytes, setting.residual_bytes, _handed_on(setting)
    readers = [len(attention.linears) - 1 for attention in attentions(group)]
    if not isinstance(group.mlp, Moe):
        readers.append(len(group.mlp.linears) - 1)
    sums = Bytes(0, 3 * r).times(group.hidden_size * sum(max(0, number - 1) for number in readers))
    after_attention = {id(attention.linears[-1]) for attention in attentions(group)}
    after_activation = {id(linear) for linear in _last_of_feed_forward(group)}
    cast = 0.0
    for linear, share in active_linears(group):
        if id(linear) in after_attention:
            continue  # the attention kernel hands on 16 bit
        is_wide = w > c if id(linear) in after_activation else r > c
        cast += share * (linear.in_features * is_wide + linear.out_features * (w > c))
    return sums + Bytes(r + c, r + c).times(cast)


def _last_of_feed_forward(group: LayerGroup) -> list[Linear]:
    mlp = group.mlp
    if not isinstance(mlp, Moe):
        return [mlp.linears[-1]]
    return [mlp.expert_linears[-1], *(mlp.shared.linears[-1:] if mlp.shared else ())]


def _adapter(in_features: int, out_features: int, setting: Setting) -> Bytes:
    """LoRA beside one matrix: the two thin products are pure traffic, and so are its casts, scale and sum.

    Source: peft 0.21 tuners/lora/layer.py Linear.forward: input cast to the adapter's dtype (and back under
    autocast), dropout, down, up, scale, sum; unsloth kernels/fast_lora.py adds in place and makes no copies.
    """
    c, a, w = setting.compute_bytes, setting.adapter_bytes, _handed_on(setting)
    if setting.fused_adapters:
        return Bytes(w * (in_features + 2 * out_features), w * (3 * in_features + 2 * out_features))
    casts = (2 if setting.autocast else 1) * (a + c) if a != c else 0
    dropout = 2 * a + 1 if setting.adapter_dropout else 0
    forward = (c + casts + dropout) * in_features + 6 * w * out_features
    return Bytes(forward, (2 * c + 3 * w + casts + dropout) * in_features + 4 * w * out_features)


def count_head_bytes(shape: ModelShape, recipe: Recipe, setting: Setting, loss: LossKernel) -> Bytes:
    """Return the bytes one token moves from the last layer to the loss and back.

    Dense: logits written, widened, log-softmax (read, write), and each gradient once; an in-place kernel reads 16-bit
    logits twice and writes the gradient over them. Fused kernels do that chunk by chunk in the forward pass; a chunked
    loss reads each chunk once, and computes it again for its gradient.

    Source: transformers loss/loss_utils.py; trl 1.16 kernels/chunked_logprob.py; Liger fused_linear_cross_entropy.py.
    """
    norm = _norm(shape.hidden_size, shape.final_norm, setting)
    if not shape.head:
        return norm
    c, vocabulary = setting.compute_bytes, shape.head[-1].out_features
    if loss == "fused":
        return norm + Bytes(5 * c, c).times(vocabulary)
    if loss == "chunked":
        return norm + Bytes(3 * c, 5 * c).times(vocabulary)
    capped = 6 * c if shape.logit_softcap else 0
    if setting.loss_in_place:
        return norm + Bytes(3 * c + capped, 3 * c + capped).times(vocabulary)
    wide = 4 if recipe.engine.upcasts_logits else c
    extra = (c + wide if wide != c else 0) + (2 * wide if recipe.engine.copies_shifted_logits else 0)
    return norm + Bytes(c + extra + 2 * wide + capped, 2 * c + extra + 4 * wide + capped).times(vocabulary)

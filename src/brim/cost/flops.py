"""Floating-point operations of a micro-batch: what the model asks for, and what checkpointing asks for again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from brim.cost.parameters import layer_linears, target_linears
from brim.spec.model import Attention, LayerGroup, Linear, ModelShape, Moe
from brim.spec.recipe import Recipe
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Operations of one micro-batch on one rank; a multiplication and an addition are two."""

    matmul_forward: float = 0.0
    """Products with weights, adapters and output head included."""
    matmul_backward: float = 0.0
    """Gradients of inputs, and of those weights that train."""
    matmul_recompute: float = 0.0
    """Products with weights that checkpointing repeats."""
    attention_forward: float = 0.0
    """Products of queries with keys and of weights with values."""
    attention_backward: float = 0.0
    """Twice the forward's: each product has two gradients."""
    attention_recompute: float = 0.0
    """Attention that checkpointing repeats."""

    @property
    def total(self) -> float:
        """All operations, recomputation included (the H of HFU)."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def model(self) -> float:
        """Operations without recomputation (the M of MFU)."""
        return self.total - self.matmul_recompute - self.attention_recompute


def count_flops(workload: Workload, strategy: Strategy) -> Flops:
    """Return the operations of one micro-batch on one rank, FLOP.

    A dense model of N matrix parameters needs 6N a token plus 6 x layers x hidden x length for causal attention;
    with adapters, whose frozen matrices need no weight gradient, 4N plus six times the adapters. Full
    checkpointing repeats the layers' forward (8N and 6N); selective checkpointing keeps the attention kernel's
    output and repeats all but that. A chunked loss repeats the logits.

    Leaves out: norms, activations, rotary, softmax, optimizer (under 1 % of the operations; they cost time as
    memory traffic, see cost/traffic.py); flash attention's own recomputation of scores (cost/rates.py).

    Source: PaLM (arXiv 2204.02311) appendix B, with the causal half of attention counted exactly; LoRA without
    weight gradients: facts/scale.md 3.1; trl 1.16 models/selective_activation_checkpointing.py and
    kernels/chunked_logprob.py.
    """
    shape, recipe = workload.model, workload.recipe
    tokens = strategy.micro_batch_size * sequence_tokens(workload)
    layers = sum(group.count * count_layer_weights(group) for group in text_groups(shape))
    adapters = sum(group.count * count_adapter_weights(group, recipe) for group in text_groups(shape))
    rest = count_outer_weights(shape)
    repeated = layers + adapters if strategy.activation_checkpointing != "none" else 0.0
    if strategy.loss_kernel == "chunked" and shape.head:
        repeated += shape.head[-1].num_weights
    attention = strategy.micro_batch_size * count_attention_flops(shape, sequence_tokens(workload))
    return Flops(
        matmul_forward=2 * tokens * (layers + rest + adapters),
        matmul_backward=2 * tokens * ((layers + rest) * (2 if recipe.lora is None else 1) + 2 * adapters),
        matmul_recompute=2 * tokens * repeated,
        attention_forward=attention,
        attention_backward=2 * attention,
        attention_recompute=attention if repeats_attention(strategy) else 0.0,
    )


def repeats_attention(strategy: Strategy) -> bool:
    """Return whether attention runs again in the backward pass: always under full checkpointing, and under
    selective where attention is no single operation whose output could be kept."""
    kind = strategy.activation_checkpointing
    return kind == "full" or (kind == "selective" and strategy.attention_kernel == "eager")


def sequence_tokens(workload: Workload) -> int:
    """Return the tokens of one sequence: the planned length, or the fixed one of vision models."""
    return workload.model.sequence_tokens or workload.data.seq_len


def text_groups(shape: ModelShape) -> tuple[LayerGroup, ...]:
    """Return the layers a token passes: not the image and sound encoders of a model that reads text as well.

    Leaves out: images and sounds a text may come with.
    """
    reads_text = any(group.stack in ("decoder", "encoder") for group in shape.groups)
    return tuple(group for group in shape.groups if not reads_text or group.stack in ("decoder", "encoder"))


def active_linears(group: LayerGroup) -> tuple[tuple[Linear, float], ...]:
    """Return every matrix of a layer and how many of its copies one token meets."""
    return tuple((linear, active_share(group, linear) * copies) for linear, copies in layer_linears(group))


def active_share(group: LayerGroup, linear: Linear) -> float:
    """Return the share of a matrix's copies that one token meets: below 1 for routed experts."""
    if isinstance(group.mlp, Moe) and any(linear is expert for expert in group.mlp.expert_linears):
        return group.mlp.num_experts_per_tok / group.mlp.num_experts
    return 1.0


def count_layer_weights(group: LayerGroup) -> float:
    """Return the weights of one layer that one token is multiplied with, elements."""
    return sum(copies * linear.num_weights for linear, copies in active_linears(group))


def count_outer_weights(shape: ModelShape) -> int:
    """Return the weights outside layers that a token is multiplied with, elements: output head and stem.

    Leaves out: that only images and sounds meet the stem of a model that reads text (0.1 % of Gemma 3 4B).
    """
    return sum(linear.num_weights for linear in (*shape.stem, *shape.head))


def active_adapters(group: LayerGroup, recipe: Recipe) -> tuple[tuple[Linear, float], ...]:
    """Return the matrices of a layer that have an adapter, and how many copies of each one token meets."""
    if recipe.lora is None:
        return ()
    hits = target_linears(group, recipe.lora.target_modules, recipe.engine.fused_experts)
    share = _expert_share(group)
    return tuple((linear, copies * (share if copies > 1 else 1.0)) for linear, copies in hits)


def _expert_share(group: LayerGroup) -> float:
    # Adapters see experts as separate modules, so that identity with the group's own matrices is lost.
    return group.mlp.num_experts_per_tok / group.mlp.num_experts if isinstance(group.mlp, Moe) else 1.0


def count_adapter_weights(group: LayerGroup, recipe: Recipe) -> float:
    """Return the adapter weights of one layer that one token is multiplied with, elements."""
    rank = recipe.lora.r if recipe.lora else 0
    return sum(
        copies * rank * (linear.in_features + linear.out_features) for linear, copies in active_adapters(group, recipe)
    )


def count_attention_flops(shape: ModelShape, seq_len: int) -> float:
    """Return the forward attention operations of one sequence, FLOP, all layers.

    Each query meets each key it may see, and each value: 2 x (head_dim + v_head_dim) operations a head. In
    encoder-decoder models both sides are taken to be `seq_len` long.
    """
    return sum(
        group.count
        * count_pairs(attention, seq_len)
        * 2
        * attention.num_attention_heads
        * (attention.head_dim + attention.v_head_dim)
        for group in text_groups(shape)
        for attention in attentions(group)
    )


def attentions(group: LayerGroup) -> Iterable[Attention]:
    """Return self-attention and, where there is one, cross-attention."""
    return (group.attention,) if group.cross_attention is None else (group.attention, group.cross_attention)


def count_pairs(attention: Attention, seq_len: int) -> int:
    """Return the (query, key) pairs of one head and one sequence that are not masked.

    Causal: seq_len x (seq_len + 1) / 2. A sliding window of w: every query its w latest keys (fewer at the start);
    in encoders a window is centred, so the ends see fewer.
    """
    window = min(attention.sliding_window or seq_len, seq_len)
    if attention.causal:
        return window * seq_len - window * (window - 1) // 2
    if window == seq_len:
        return seq_len * seq_len
    side = window // 2
    return seq_len * (2 * side + 1) - side * (side + 1) if 2 * side + 1 < seq_len else seq_len * seq_len

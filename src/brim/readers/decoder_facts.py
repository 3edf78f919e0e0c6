"""What there is to know about a decoder-only architecture; `decoder_table` has a record of each.

A bias or another yes/no is either a constant or the name of the config key that decides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from brim.spec.model import NormKind

WindowRule = Literal["none", "all", "listed", "late", "early_even", "periodic", "unrotated"]
SparseRule = Literal["all", "stepped", "after_dense"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFacts:
    """The mixture-of-experts block of an architecture."""

    sparse: SparseRule
    """Which layers have it: all; every `decoder_sparse_step`-th but `mlp_only_layers` (`stepped`); those from
    `first_k_dense_replace` on (`after_dense`)."""
    width: str = "moe_intermediate_size"
    """Key of the inner width of one expert."""
    router: str = "gate"
    """Name of the router."""
    shared: Literal["none", "gated", "several"] = "none"
    """Shared experts: none; one behind a gate (Qwen2-MoE); `n_shared_experts` as one block (DeepSeek)."""
    bias: bool = False
    """Whether router and experts have biases."""
    bare_experts: bool = False
    """Whether experts are one 3-D parameter in every release (gpt-oss), not only since transformers 5."""
    bare_router: bool = False
    """Whether the router is a bare parameter in every release, not only since transformers 5."""
    rerouted: bool = True
    """Whether PEFT turns adapters named after separate experts into ones on the fused parameters."""
    separate_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of an expert's matrices before transformers 5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderFacts:
    """A decoder-only architecture."""

    prefixes: tuple[str, ...]
    """Class name before `ForCausalLM`, `Model`, ...; the first is the usual one."""
    defaults: Mapping[str, Any]
    """transformers' own value of keys a config may leave out."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spelling of a key -> canonical name."""

    norm: NormKind = "rmsnorm"
    """Kind of every normalisation; a layernorm here has a bias."""
    num_norms: int = 2
    """Normalisations of hidden width in each layer."""
    parallel: bool | str = False
    """Whether attention and feed-forward read the same input."""
    attention: Literal["grouped", "latent"] = "grouped"
    """Kind of attention: separate or grouped heads, or DeepSeek's latent."""
    square: bool = False
    """Whether heads always tile the hidden width and keys and values have as many: `head_dim` is no key there."""
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of the attention matrices: query, key, value, output; or fused, output."""
    query_bias: bool | str = False
    """Bias of query, key and value."""
    output_bias: bool | str = False
    """Bias of the output projection."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Normalisation of queries and keys."""
    qk_norm_if: bool | str = True
    """Whether that normalisation is there at all."""
    rotary: bool = True
    """Whether positions are rotations."""
    sinks: bool = False
    """Learned attention sinks."""
    window: WindowRule = "none"
    """Which layers see a sliding window; see `decoder_layers`."""
    window_if: bool | str = True
    """Whether windows are in use."""
    window_period: int | str = 0
    """Rule `periodic`: every so-many-th layer sees everything (a number, or the key that gives it)."""

    width: str | None = "intermediate_size"
    """Key of the feed-forward's inner width; where it is null or there is none, four times the hidden width."""
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """Names of the feed-forward matrices in call order."""
    mlp_bias: bool | str = False
    """Bias of the feed-forward matrices."""
    activation: str = "hidden_act"
    """Key of the activation function."""
    experts: ExpertFacts | None = None
    """Mixture of experts, if it has one."""

    embedding: str = "embed_tokens"
    """Name of the token embedding."""
    positions: tuple[str, int] | None = None
    """Name of a learned position table and its rows beyond `max_position_embeddings`."""
    embedding_norm: bool = False
    """Whether the embedding is normalised (BLOOM)."""
    language_head: str = "ForCausalLM"
    """Class name after the prefix for language modelling."""
    language_head_bias: bool = False
    """Bias of the output head."""
    token_head: str = "score"
    """Name of the token classification head."""

"""What a model is made of: groups of identical layers, as numbers. No weights, no torch, no I/O.

A `ModelShape` is read from a Hugging Face config (`readers.hf_config`) or from a live module
(`readers.module`). Field names are the HF config keys wherever one exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pydantic import ConfigDict

# A plain dict, so that reading a card does not import pydantic (60 ms); JSON at the edge does.
STRICT: ConfigDict = {"extra": "forbid", "strict": True, "use_attribute_docstrings": True}

NormKind = Literal["rmsnorm", "layernorm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One weight matrix of a layer, named as the module that holds it."""

    __pydantic_config__ = STRICT

    name: str
    """Last part of the HF module path, for example `q_proj`; LoRA targets match it."""
    in_features: int
    """Input width, elements."""
    out_features: int
    """Output width, elements."""
    bias: bool = False
    """Whether a bias vector of `out_features` elements is trained with it."""
    bare: bool = False
    """Whether it is a bare parameter or a convolution in every release of transformers rather than an
    `nn.Linear`: adapters and bitsandbytes pass over it."""

    @property
    def num_weights(self) -> int:
        """Elements of the matrix, without the bias."""
        return self.in_features * self.out_features

    @property
    def num_parameters(self) -> int:
        """Elements of the matrix and its bias."""
        return self.num_weights + (self.out_features if self.bias else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention block of a layer."""

    __pydantic_config__ = STRICT

    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key and value heads (fewer than query heads under grouped-query attention)."""
    head_dim: int
    """Width of one query or key head, elements."""
    v_head_dim: int
    """Width of one value head, elements; differs from `head_dim` under latent attention."""
    linears: tuple[Linear, ...]
    """Every projection, in the order the forward pass calls them; the last is the output projection."""
    sliding_window: int | None = None
    """Tokens each query sees, or None for all of them."""
    causal: bool = True
    """False in encoders and in cross-attention."""
    rotary: bool = True
    """Whether queries and keys are rotated by position."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Normalisation of queries and keys: over each head, over the whole width, or none."""
    latent: bool = False
    """Multi-head latent attention (DeepSeek): keys and values are expanded from a low-rank latent."""
    sinks: bool = False
    """Learned attention sinks (gpt-oss); only kernels that know them apply."""
    shares_kv: bool = False
    """Keys and values are those of an earlier layer (Gemma 4): this one has no matrices for them."""
    other_parameters: int = 0
    """Parameters that are no matrix: query/key norms, sinks, relative position tables."""

    @property
    def q_size(self) -> int:
        """Width of all queries, elements."""
        return self.num_attention_heads * self.head_dim

    @property
    def k_size(self) -> int:
        """Width of all keys, elements."""
        return self.num_key_value_heads * self.head_dim

    @property
    def v_size(self) -> int:
        """Width of all values, elements."""
        return self.num_key_value_heads * self.v_head_dim

    @property
    def out_size(self) -> int:
        """Width of the attention output before the output projection, elements."""
        return self.num_attention_heads * self.v_head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """A dense feed-forward block."""

    __pydantic_config__ = STRICT

    intermediate_size: int
    """Inner width, elements."""
    gated: bool
    """Three matrices (gate, up, down) if true, two otherwise."""
    hidden_act: str
    """Activation function, HF name."""
    linears: tuple[Linear, ...]
    """Every matrix in call order; the last projects back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """A mixture-of-experts feed-forward block."""

    __pydantic_config__ = STRICT

    num_experts: int
    """Routed experts."""
    num_experts_per_tok: int
    """Routed experts each token visits."""
    intermediate_size: int
    """Inner width of one routed expert, elements."""
    hidden_act: str
    """Activation function, HF name."""
    router: Linear
    """The matrix that scores experts."""
    expert_linears: tuple[Linear, ...]
    """The matrices of one expert."""
    separate_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of an expert's matrices where experts are modules of their own (before transformers 5)."""
    adapters_reach_experts: bool = False
    """Whether PEFT turns the names of separate experts into adapters on the fused parameters (PEFT 0.19 on)."""
    shared: Mlp | None = None
    """Experts every token visits, as one dense block."""
    shared_gate: Linear | None = None
    """The matrix that weighs the shared experts (Qwen2-MoE)."""
    router_is_module: bool = False
    """Whether the router is an `nn.Linear` in transformers 5 too (Gemma 4), not a bare parameter."""
    other_parameters: int = 0
    """Parameters that are no matrix: score corrections, router scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Identical layers: count x attention x feed-forward."""

    __pydantic_config__ = STRICT

    count: int
    """How many such layers."""
    attention: Attention
    """Self-attention of each layer."""
    mlp: Mlp | Moe
    """Feed-forward block of each layer."""
    norm: NormKind
    """Kind of the layer's normalisations."""
    num_norms: int
    """Normalisations of hidden width in each layer."""
    norm_bias: bool = False
    """Whether each normalisation has a bias vector."""
    cross_attention: Attention | None = None
    """Attention over the encoder's output, in decoders of encoder-decoder models."""
    parallel: bool = False
    """Attention and feed-forward read the same input (GPT-NeoX, Falcon, Phi-2)."""
    stack: Literal["decoder", "encoder", "vision", "audio"] = "decoder"
    """Which stack the layers belong to."""
    hidden_size: int
    """Width of the residual stream in this stack, elements."""
    other_linears: tuple[Linear, ...] = ()
    """Matrices of a layer outside attention and feed-forward (Gemma 4's per-layer inputs)."""
    other_parameters: int = 0
    """Parameters of a layer counted nowhere else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """A lookup table outside the layers."""

    __pydantic_config__ = STRICT

    name: str
    """Last part of the HF module path."""
    num_embeddings: int
    """Rows."""
    embedding_dim: int
    """Columns."""

    @property
    def num_parameters(self) -> int:
        """Elements of the table."""
        return self.num_embeddings * self.embedding_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """What is zeroed while the model trains, by place. Architectures spell the keys of their configs differently."""

    __pydantic_config__ = STRICT

    attention_dropout: float = 0.0
    """Fraction of attention's weights; fused kernels draw it anew backward and keep no mask."""
    hidden_dropout: float = 0.0
    """Fraction of what each branch adds to the residual stream."""
    embedding_dropout: float = 0.0
    """Fraction of the embeddings."""
    activation_dropout: float = 0.0
    """Fraction of what the feed-forward's last matrix reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A whole model as numbers: embeddings, groups of layers, head."""

    __pydantic_config__ = STRICT

    name: str
    """Hub id, folder or size the user gave."""
    model_type: str
    """HF `model_type`."""
    architecture: str
    """HF class that is trained, for example `LlamaForCausalLM`."""
    hidden_size: int
    """Width of the residual stream, elements."""
    vocab_size: int
    """Rows of the output head; 0 for models without one over tokens."""
    max_position_embeddings: int | None
    """Longest sequence the model was built for, tokens; None if unbounded."""
    tie_word_embeddings: bool
    """Whether the output head is the input embedding."""
    embeddings: tuple[Embedding, ...]
    """Lookup tables; the first is the token embedding."""
    groups: tuple[LayerGroup, ...]
    """Layers in order of the forward pass, run-length encoded by kind."""
    head: tuple[Linear, ...]
    """Matrices after the last layer; the last gives the logits. Tied heads are listed too. Empty for a model
    without a head (`LlamaModel`)."""
    stem: tuple[Linear, ...] = ()
    """Matrices before the first layer: patch embedding, OPT-350m's `project_in`, vision-to-text projector."""
    final_norm: NormKind
    """Kind of the normalisation before the head."""
    other_parameters: int = 0
    """Parameters outside layers that are no matrix: final and embedding norms, class tokens."""
    dropout: Dropout = Dropout()
    """What is dropped out while the model trains."""
    logit_softcap: bool = False
    """Whether logits pass through a tanh cap (Gemma 2), which keeps two more copies."""
    native_dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """dtype the checkpoint is stored in."""
    sequence_tokens: int | None = None
    """Fixed length of a sequence (vision models: patches and class token); None if free."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers over all groups."""
        return sum(group.count for group in self.groups)

"""How the model is trained: everything that changes the training result, and the engine that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brim.spec.model import STRICT

Dtype = Literal["fp32", "bf16", "fp16"]
Method = Literal["full", "lora", "qlora", "prompt-tuning", "prefix-tuning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A low-rank adapter."""

    __pydantic_config__ = STRICT

    r: int
    """Rank."""
    alpha: float
    """Scale numerator."""
    dropout: float = 0.0
    """Dropout before the first adapter matrix, fraction."""
    target_modules: tuple[str, ...]
    """Names of the matrices that get an adapter; `all-linear` means every one but the head."""
    use_dora: bool = False
    """Weight-decomposed variant: a magnitude vector per matrix."""
    use_rslora: bool = False
    """Rank-stabilised scale; changes no memory."""
    dtype: Dtype = "fp32"
    """dtype of the adapter's weights, gradients and optimizer states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the frozen base weights are stored."""

    __pydantic_config__ = STRICT

    kind: Literal["nf4", "fp4", "int8", "gptq-int4", "fp8"]
    """Storage format of the quantised matrices."""
    double_quant: bool = False
    """bitsandbytes: the scales are quantised once more."""
    block_size: int = 64
    """Weights that share a scale (bitsandbytes 64, GPTQ usually 128)."""
    keeps_inputs: bool = False
    """Whether every quantised product keeps its input for backward (bitsandbytes before 0.44)."""
    upcast_rest: bool = False
    """Whether 16-bit parameters are cast to fp32 (PEFT's `prepare_model_for_kbit_training`)."""
    narrow_embeddings: bool = False
    """Whether embeddings and head are cast back to 16 bit after that (TRL before 0.25, under bf16)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Training on pairs of answers (DPO): every sequence of the batch is a chosen and a rejected one."""

    __pydantic_config__ = STRICT

    reference: Literal["model", "adapter", "precomputed"] = "model"
    """Where reference log-probabilities come from: a second frozen model, the same model with its adapter switched
    off, or a pass before training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What the training loop does between the user's lines: each of these moves gigabytes."""

    __pydantic_config__ = STRICT

    name: str
    """Trainer preset of the trainers table: `trl`, `transformers`, `unsloth`, `accelerate`, `plain`."""
    set_to_none: bool = True
    """Whether gradients are freed after the optimizer step rather than zeroed."""
    logits_alive_in_backward: bool = False
    """Whether the loop keeps the model's output until after the backward pass."""
    upcasts_logits: bool = True
    """Whether the loss runs on an fp32 copy of the logits."""
    frees_narrow_logits: bool = False
    """Whether the fp32 copy of the logits replaces the 16-bit ones at once (transformers before 4.46)."""
    copies_shifted_logits: bool = False
    """Whether logits are copied to drop the last position (transformers before 4.50) rather than labels padded."""
    repeats_kv: bool = False
    """Whether keys and values are repeated to all heads before the attention kernel."""
    keeps_loss_chunks: bool = False
    """Whether a chunked loss keeps every chunk's probabilities for backward (lit-gpt, torchtune) or recomputes them."""
    reentrant_checkpointing: bool = False
    """Whether recomputation runs the layer to its end and holds its output (`use_reentrant=True`)."""
    flattens_packed: bool = False
    """Whether packed sequences of a micro-batch are laid end to end in one row (TRL's best-fit packing)."""
    always_masks: bool = False
    """Whether a mask is built though every sequence is full (transformers 4.53 to 4.57, no mask given, no cache)."""
    fused_experts: bool = True
    """Whether experts are one 3-D parameter (transformers 5), which bitsandbytes leaves in 16 bit."""
    evaluates: bool = True
    """Whether the loop evaluates with the training micro-batch."""
    resumes: bool = False
    """Whether the run goes on from a checkpoint: optimizer states are there before the first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Method, precision and optimizer, and the engine whose semantics apply."""

    __pydantic_config__ = STRICT

    method: Method
    """Which parameters train: all (`full`), adapters (`lora`), adapters on a 4- or 8-bit base (`qlora`), virtual tokens
    before the text (`prompt-tuning`), or before the keys and values of every layer (`prefix-tuning`)."""
    optimizer: str = "adamw"
    """Key of the optimizers table."""
    weight_dtype: Dtype = "bf16"
    """dtype the unquantised weights are loaded in."""
    compute_dtype: Dtype = "bf16"
    """dtype of matrix products."""
    autocast: bool = False
    """Whether the forward pass runs under autocast."""
    master_weights: bool = False
    """Whether the optimizer holds a further fp32 copy of trained weights."""
    gradient_dtype: Dtype | None = None
    """dtype of gradients; None means that of the trained weight."""
    lora: Lora | None = None
    """The adapter, for `lora` and `qlora`."""
    quantization: Quantization | None = None
    """Storage of the frozen base, for `qlora`."""
    num_virtual_tokens: int | None = None
    """Trained tokens in front of every sequence, for `prompt-tuning` and `prefix-tuning`."""
    preference: Preference | None = None
    """Pairs of answers and their reference, for DPO; None for training on labels."""
    engine: Engine
    """Semantics of the training loop."""

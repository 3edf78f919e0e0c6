"""What decides the tensors of a layer besides its shape: precision, adapters, kernels, length."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from brim.cost.attention_kernels import AMPERE
from brim.cost.modeling import Modeling, find_modeling
from brim.errors import UnsupportedModel
from brim.spec.model import Attention, Dropout, Linear, ModelShape, Moe, NormKind
from brim.spec.recipe import Dtype, Lora, Quantization, Recipe
from brim.spec.strategy import AttentionKernel, Strategy
from brim.spec.workload import Workload
from brim.tables.read import find_kernels

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Precision, adapters and kernels, as element sizes and flags."""

    compute_bytes: int
    """Bytes of an element in matrix products."""
    compute_dtype: Dtype
    """Dtype of matrix products."""
    capability: tuple[int, int]
    """CUDA compute capability of the card."""
    residual_bytes: int
    """Bytes of an element of the residual stream: fp32 when embeddings are."""
    weight_bytes: int
    """Bytes of an unquantised weight."""
    autocast: bool
    """Whether products cast their operands."""
    trains_base: bool
    """Whether the model's own weights train."""
    quantization: Quantization | None
    """Storage of the frozen matrices of the layers."""
    adapter_rank: int
    """LoRA rank, 0 without adapters."""
    adapter_bytes: int
    """Bytes of an adapter weight."""
    adapter_targets: frozenset[str]
    """Matrices with an adapter; `all-linear` means all of them."""
    spared: frozenset[str]
    """Names PEFT takes out of the targets, because it adapts fused experts in their stead."""
    adapter_dropout: bool
    """Whether a mask and a dropped-out copy are kept per adapter."""
    attention: AttentionKernel
    """Attention implementation."""
    fused_norm: bool
    """Whether normalisations are one kernel."""
    fused_rotary: bool
    """Whether rotation happens in place."""
    fused_gate: bool
    """Whether a gated MLP keeps only its two projections."""
    fused_adapters: bool
    """Whether an adapter is one kernel with its matrix and keeps only the input."""
    unpacking_buffer: bool
    """Whether products unpack quantised matrices forward into one buffer that is never given back."""
    loss_in_place: bool
    """Whether cross-entropy writes its gradient over the logits."""
    seq_len: int
    """Tokens in a sequence."""
    attended_len: int
    """Tokens each query is scored against: its sequence, or all sequences of a row they share."""
    masked: bool
    """Whether a padding mask reaches the attention kernel."""
    repeats_kv: bool
    """Whether keys and values are repeated to all heads."""
    fused_experts: bool
    """Whether experts are one 3-D parameter that is neither quantised nor adapted."""
    num_masks: int
    """Attention masks the model builds once for all layers: for full attention, for windows."""
    code: Modeling
    """How transformers writes the architecture."""
    dropout: Dropout
    """What the model itself drops out while it trains."""

    def masks(self, attention: Attention) -> bool:
        """Whether a mask reaches SDPA in this attention block: padding, or a window shorter than the sequence.

        Source: transformers masking_utils.py _ignore_causal_mask_sdpa.
        """
        window = attention.sliding_window
        always = self.masked or self.code.always_masks
        return self.attention == "sdpa" and (always or (window is not None and self.attended_len >= window))

    @property
    def bitsandbytes(self) -> bool:
        """Whether quantised matrices are bitsandbytes' own layers."""
        return self.quantization is not None and self.quantization.kind in ("nf4", "fp4", "int8")

    @property
    def rest_bytes(self) -> int:
        """Bytes of an element of what is not quantised."""
        return 4 if self.quantization is not None and self.quantization.upcast_rest else self.weight_bytes

    @property
    def output_bytes(self) -> int:
        """Bytes of an element of the output matrix."""
        narrowed = self.quantization is not None and self.quantization.narrow_embeddings
        return self.weight_bytes if narrowed else self.rest_bytes

    def adapts(self, linear: Linear) -> bool:
        """Whether this matrix has an adapter."""
        named = bool(self.adapter_targets & {linear.name, "all-linear"}) and linear.name not in self.spared
        return self.adapter_rank > 0 and named


def read_setting(workload: Workload, strategy: Strategy) -> Setting:
    """Return the element sizes and flags a workload and strategy imply.

    Raises:
        UnsupportedModel: the recipe has a part the formula does not know (DoRA).
    """
    recipe, lora = workload.recipe, workload.recipe.lora
    kernels, quantised = find_kernels(strategy.layer_kernels), recipe.quantization is not None
    unknown = name_unknown(workload)
    if unknown is not None:
        raise UnsupportedModel(model=workload.model.name, what=unknown)
    code = find_modeling(workload.model.model_type)
    seq_len = workload.model.sequence_tokens or workload.data.seq_len
    setting = Setting(
        compute_bytes=compute_bytes(recipe), compute_dtype=_compute_dtype(recipe),
        capability=workload.cluster.device.compute_capability or AMPERE, residual_bytes=residual_bytes(recipe),
        weight_bytes=DTYPE_BYTES[recipe.weight_dtype], autocast=recipe.autocast,
        trains_base=recipe.method == "full", quantization=recipe.quantization,
        adapter_rank=lora.r if lora else 0, adapter_bytes=DTYPE_BYTES[lora.dtype] if lora else 0,
        adapter_targets=frozenset(lora.target_modules) if lora else frozenset(),
        spared=_spared_names(workload.model) if recipe.engine.fused_experts else frozenset(),
        adapter_dropout=bool(lora and lora.dropout), attention=attention_kernel(strategy.attention_kernel, code),
        fused_norm=kernels.norm, fused_rotary=kernels.rotary,
        fused_gate=kernels.gate == "always" or (kernels.gate == "adapted" and _adapts_mlp(lora)),
        fused_adapters=kernels.adapters == "always" or (kernels.adapters == "quantised" and quantised),
        unpacking_buffer=kernels.unpacking_buffer and quantised and lora is not None and not lora.dropout,
        loss_in_place=kernels.loss_in_place, seq_len=seq_len,
        attended_len=seq_len * (strategy.micro_batch_size if is_flattened(workload, strategy) else 1),
        masked=is_masked(workload, strategy), repeats_kv=recipe.engine.repeats_kv,
        fused_experts=recipe.engine.fused_experts, num_masks=0, code=code,
        dropout=workload.model.dropout,
    )  # fmt: skip
    return replace(setting, num_masks=_count_masks(workload.model, setting))


def name_unknown(workload: Workload) -> str | None:
    """Return the part of a recipe the formula does not know, None if it knows it all."""
    recipe = workload.recipe
    if recipe.preference is not None:
        return "the loss of pairs of answers"
    if recipe.method in ("prompt-tuning", "prefix-tuning"):
        return f"the {recipe.method}"
    return "the DoRA adapters" if recipe.lora is not None and recipe.lora.use_dora else None


def _spared_names(shape: ModelShape) -> frozenset[str]:
    """Names of former modules of fused experts and their router, wherever else they occur.

    Source: PEFT 0.21 utils/transformers_weight_conversion.py _convert_peft_config_moe.
    """
    reached = [group.mlp for group in shape.groups if isinstance(group.mlp, Moe) and group.mlp.adapters_reach_experts]
    return frozenset(name for moe in reached for name in (moe.router.name, *moe.separate_names))


def attention_kernel(wanted: AttentionKernel, code: Modeling) -> AttentionKernel:
    """Return the kernel that runs: the wanted one if the architecture's code has it."""
    if wanted == "flash" and not code.has_flash:
        wanted = "sdpa"
    return "eager" if wanted == "sdpa" and not code.has_sdpa else wanted


def _count_masks(shape: ModelShape, setting: Setting) -> int:
    """Masks built once for all layers: eager attention always adds one where it is causal or padded."""
    blocks = [group.attention for group in shape.groups if group.stack in ("decoder", "encoder")]
    if setting.attention == "eager":
        blocks = [block for block in blocks if setting.masked or block.causal or block.sliding_window]
    else:
        blocks = [block for block in blocks if setting.masks(block)]
    return len({block.sliding_window is None for block in blocks})


def _adapts_mlp(lora: Lora | None) -> bool:
    names = {"all-linear", "gate_proj", "up_proj", "gate_up_proj"}
    return lora is not None and bool(names & set(lora.target_modules))


def compute_bytes(recipe: Recipe) -> int:
    """Return bytes of an element in matrix products: autocast's dtype, else that of the weights."""
    return DTYPE_BYTES[_compute_dtype(recipe)]


def _compute_dtype(recipe: Recipe) -> Dtype:
    return recipe.compute_dtype if recipe.autocast else recipe.weight_dtype


def residual_bytes(recipe: Recipe) -> int:
    """Return bytes of an element of the residual stream: the embedding's dtype decides it.

    Source: peft/utils/other.py prepare_model_for_kbit_training casts embeddings and norms to fp32;
    a sum of an fp32 residual and a 16-bit branch is fp32.
    """
    upcast = recipe.quantization is not None and recipe.quantization.upcast_rest
    return 4 if upcast else DTYPE_BYTES[recipe.weight_dtype]


def is_masked(workload: Workload, strategy: Strategy) -> bool:
    """Whether a mask is built: padding between sequences of different lengths, or several sequences in one row.

    Source: transformers masking_utils.py: no mask is made when every sequence is full.
    """
    flattened = is_flattened(workload, strategy)
    padded = not workload.data.packing and not flattened and strategy.micro_batch_size > 1
    return padded or flattened or workload.recipe.engine.always_masks


def is_flattened(workload: Workload, strategy: Strategy) -> bool:
    """Whether the sequences of a micro-batch are one row, told apart by their positions.

    SDPA then gets a mask over the whole row; flash attention reads the boundaries and needs none.

    Source: trl 1.16 trainer/sft_trainer.py (padding-free with best-fit packing); transformers masking_utils.py
    packed_sequence_mask_function.
    """
    return strategy.padding_free or (workload.data.packing and workload.recipe.engine.flattens_packed)


def quantised_bytes(linear: Linear, quantization: Quantization) -> int:
    """Return the bytes a quantised matrix takes, scales included.

    Source: bitsandbytes functional.py quantize_4bit: one fp32 absmax per block; nested, one uint8
    per block and one fp32 per 256 blocks. int8: one fp32 absmax per output row. GPTQ (v1 layout):
    packed weights, fp16 scale and packed zero per group of inputs, int32 group index per input.
    """
    count, block = linear.num_weights, quantization.block_size
    blocks = math.ceil(count / block)
    match quantization.kind:
        case "nf4" | "fp4":
            scales = blocks + 4 * math.ceil(blocks / 256) if quantization.double_quant else 4 * blocks
            return math.ceil(count / 2) + scales
        case "int8":
            return count + 4 * linear.out_features
        case "fp8":
            return count + 4 * math.ceil(count / (128 * 128))
        case "gptq-int4":
            groups = math.ceil(linear.in_features / block)
            return math.ceil(count / 2) + groups * linear.out_features * 5 // 2 + 4 * linear.in_features


def norm_is_fused(kind: NormKind, setting: Setting) -> bool:
    """Whether a normalisation is one kernel: `layernorm` always, `rmsnorm` only with fused layer kernels."""
    return kind == "layernorm" or setting.fused_norm

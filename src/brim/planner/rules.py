"""What cannot run, as rules: each takes a workload and a strategy and returns None or the reason.

The same text prunes a candidate, refuses a user's fixed knob, and explains the alternatives table.
"""

from __future__ import annotations

from collections.abc import Callable

from brim.cost.modeling import find_modeling
from brim.planner.batch import ranks_text
from brim.spec.device import Device
from brim.spec.model import ModelShape
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.tables.dialects import list_dialects
from brim.tables.read import Trainer, find_optimizer, find_trainer

Rule = Callable[[Workload, Strategy], str | None]

LARGEST_FLASH_HEAD = 256
"""Widest head of FlashAttention-2, elements. Source: flash-attn README, head dimensions up to 256."""
FLASH_CAPABILITY = (8, 0)
"""Ampere and newer. Source: flash-attn README."""
BF16_CAPABILITY = (8, 0)
"""Native bf16 products. Source: CUDA C++ programming guide, table of compute capabilities."""
CAUSAL_TRAINERS = frozenset({"trl", "trl-dpo", "unsloth"})
"""Trainers whose loss is the next token's. Source: trl 1.16 trainer/sft_trainer.py, unsloth FastLanguageModel."""
INT8_CAPABILITY = (7, 5)
"""int8 tensor cores, which LLM.int8 needs. Source: bitsandbytes README, hardware table."""


_OVERFLOWING = ("t5", "mt5", "umt5", "gemma", "gemma2", "gemma3")
"""Families trained in bf16 whose activations exceed 65,504, the largest fp16 number.

Source: huggingface/transformers issues 9295 and 23918, PR 10956 (T5, mT5); issue 36822 and PR 37226 (Gemma 3: over
65k by design of its scaled embeddings and norms, which Gemma and Gemma 2 share).
"""


def overflows_fp16(model: ModelShape) -> bool:
    """Return whether activations of this family are known to overflow in fp16."""
    return model.model_type in _OVERFLOWING or model.model_type.startswith("gemma3")


def broken_rule(workload: Workload, strategy: Strategy) -> str | None:
    """Return the reason of the first rule this strategy breaks, or None."""
    for rule in RULES:
        reason = rule(workload, strategy)
        if reason is not None:
            return reason
    return None


def whole_batch(workload: Workload, strategy: Strategy) -> str | None:
    """Micro-batch x accumulation x ranks is exactly the effective batch, and every factor at least 1."""
    micro, steps, ranks = (
        strategy.micro_batch_size, strategy.gradient_accumulation_steps, strategy.mesh.data_parallel_size
    )  # fmt: skip
    if min(micro, steps) >= 1 and micro * steps * ranks == workload.batch.sequences:
        return None
    return (
        f"micro-batch {micro} x accumulation {steps} x {ranks_text(ranks)} is {micro * steps * ranks} sequences, "
        f"not the effective batch {workload.batch.sequences}"
    )


def mesh_spans_devices(workload: Workload, strategy: Strategy) -> str | None:
    """The parallel degrees multiply to the number of devices."""
    spanned, present = strategy.mesh.num_devices, workload.cluster.num_devices
    return None if spanned == present else f"the mesh spans {spanned} devices, there are {present}"


def only_replicas(workload: Workload, strategy: Strategy) -> str | None:
    """Every rank holds a whole replica; sharding is not costed yet."""
    sharded = strategy.mesh.num_devices != strategy.mesh.dp_replicate
    if strategy.zero_stage and strategy.mesh.data_parallel_size == 1:
        return f"ZeRO stage {strategy.zero_stage} shards over data-parallel ranks, and there is only 1"
    if sharded or strategy.zero_stage or strategy.offload != "none":
        return "sharding and offload of model states are not planned yet; every rank holds a whole replica"
    return None


def bf16_card(workload: Workload, strategy: Strategy) -> str | None:
    """bf16 products need compute capability 8.0."""
    device = workload.cluster.device
    if workload.recipe.compute_dtype != "bf16" or not _older(device, BF16_CAPABILITY):
        return None
    return f"bf16 needs compute capability 8.0, {device.name} has {_capability(device)}; use dtype fp16"


def int8_card(workload: Workload, strategy: Strategy) -> str | None:
    """LLM.int8 products need int8 tensor cores."""
    quantization, device = workload.recipe.quantization, workload.cluster.device
    if quantization is None or quantization.kind != "int8" or not _older(device, INT8_CAPABILITY):
        return None
    return f"int8 weights need compute capability 7.5, {device.name} has {_capability(device)}; use nf4"


def flash_attention(workload: Workload, strategy: Strategy) -> str | None:
    """FlashAttention-2 needs Ampere, 16-bit numbers, heads up to 256 wide, and a model that knows it."""
    if strategy.attention_kernel != "flash":
        return None
    device, model = workload.cluster.device, workload.model
    head_dim = max((group.attention.head_dim for group in model.groups), default=0)
    if device.vendor == "nvidia" and _older(device, FLASH_CAPABILITY):
        return f"flash attention needs compute capability 8.0, {device.name} has {_capability(device)}; use sdpa"
    if workload.recipe.compute_dtype == "fp32":
        return "flash attention needs dtype bf16 or fp16, not fp32; use sdpa"
    if head_dim > LARGEST_FLASH_HEAD:
        return f"flash attention takes heads up to {LARGEST_FLASH_HEAD} wide, {model.name} has {head_dim}; use sdpa"
    if not find_modeling(model.model_type).has_flash:
        return f"transformers has no flash attention for {model.model_type}; use {default_attention(workload)}"
    return None


def sdpa_attention(workload: Workload, strategy: Strategy) -> str | None:
    """Some models have a term in their scores that torch's SDPA does not know."""
    if strategy.attention_kernel != "sdpa" or find_modeling(workload.model.model_type).has_sdpa:
        return None
    return f"transformers has no SDPA attention for {workload.model.model_type}; use eager"


def default_attention(workload: Workload) -> str:
    """Return the kernel transformers picks by itself: SDPA where the model has it, else eager."""
    return "sdpa" if find_modeling(workload.model.model_type).has_sdpa else "eager"


def checkpointing_words(workload: Workload, strategy: Strategy) -> str | None:
    """The trainer's newest release has a setting for the kind of checkpointing."""
    trainer, own = _trainer(workload).name, _trainer(workload).checkpointing_kinds
    kinds = own or next((dialect.checkpointing_kinds for dialect in list_dialects() if dialect.target == trainer), None)
    kind = strategy.activation_checkpointing
    if kinds is None or kind in kinds:
        return None
    return f"{trainer} has no setting for {kind} checkpointing; use {' or '.join(reversed(kinds))}"


def is_causal(model: ModelShape) -> bool:
    """Whether a model predicts the next token from those before: no encoder, and a head over the vocabulary."""
    if not model.groups:  # an architecture without tables is known by its class alone
        return model.architecture.endswith(("ForCausalLM", "LMHeadModel"))
    text = [group for group in model.groups if group.stack not in ("vision", "audio")]
    return bool(text and model.head and model.vocab_size) and all(group.attention.causal for group in text)


def causal_trainer(workload: Workload, strategy: Strategy) -> str | None:
    """TRL's and Unsloth's supervised trainers train causal language models only."""
    trainer, model = _trainer(workload).name, workload.model
    if trainer not in CAUSAL_TRAINERS or is_causal(model):
        return None
    return (
        f"{trainer} trains causal language models, {model.name} is a {model.architecture}; use --trainer transformers"
    )


def loss_kernel(workload: Workload, strategy: Strategy) -> str | None:
    """Each trainer has its own way from logits to loss."""
    known = _trainer(workload).loss_kernels
    if strategy.loss_kernel in known:
        return None
    return f"{_trainer(workload).name} has no {strategy.loss_kernel} loss; it has {' or '.join(known)}"


def layer_kernels(workload: Workload, strategy: Strategy) -> str | None:
    """Each trainer has its own fused layer kernels."""
    known = _trainer(workload).layer_kernels
    if strategy.layer_kernels in known:
        return None
    return f"{_trainer(workload).name} has no {strategy.layer_kernels} layer kernels; it has {' or '.join(known)}"


def optimizer_kernel(workload: Workload, strategy: Strategy) -> str | None:
    """Each optimizer has its own implementations."""
    optimizer = find_optimizer(workload.recipe.optimizer)
    if strategy.optimizer_kernel in optimizer.kernels:
        return None
    return f"{optimizer.name} has no {strategy.optimizer_kernel} kernel; it has {' or '.join(optimizer.kernels)}"


def activation_offload(workload: Workload, strategy: Strategy) -> str | None:
    """Offloaded activations are the inputs of checkpointed layers, and only some trainers move them."""
    if not strategy.activation_offload:
        return None
    if not _trainer(workload).activation_offload:
        return f"{_trainer(workload).name} does not keep activations in host memory"
    if strategy.activation_checkpointing != "full":
        return "activation offload moves the inputs of checkpointed layers; it needs full checkpointing"
    return _offload_too_short(workload)


def _offload_too_short(workload: Workload) -> str | None:
    trainer, tokens = _trainer(workload).name, workload.data.seq_len
    least = next((row.activation_offload_min_tokens for row in list_dialects() if row.target == trainer), 0)
    return f"{trainer} offloads activations from {least} tokens on, not at {tokens}" if tokens < least else None


RULES: tuple[Rule, ...] = (
    whole_batch, causal_trainer, mesh_spans_devices, only_replicas, bf16_card, int8_card, flash_attention,
    sdpa_attention, checkpointing_words, loss_kernel, layer_kernels, optimizer_kernel, activation_offload,
)  # fmt: skip


def _older(device: Device, needed: tuple[int, int]) -> bool:
    """Whether the card is known to be older; an unknown card is not held back."""
    return device.compute_capability is not None and device.compute_capability < needed


def _capability(device: Device) -> str:
    return ".".join(str(part) for part in device.compute_capability or ())


def _trainer(workload: Workload) -> Trainer:
    return find_trainer(workload.recipe.engine.name)

"""From brim's words to those of Hugging Face: renaming only, shared by every target that speaks them.

How each knob of a `Strategy` travels (`readers.trainer_args` reads the same words back):

    micro_batch_size, gradient_accumulation_steps   keywords of that name (`per_device_train_batch_size`)
    activation_checkpointing, activation_offload    the dialect's flag and its options
    attention_kernel                                `attn_implementation` of from_pretrained
    loss_kernel                                     `loss_type`, `liger_kernel_config`, or the trainer's only one
    optimizer_kernel                                `optim`
    layer_kernels                                   `use_liger_kernel` and its config, or the trainer's only one
    padding_free, compile                           `padding_free`, `torch_compile`
    allocator                                       `PYTORCH_CUDA_ALLOC_CONF`
    zero_stage, offload                             the DeepSpeed config
    mesh                                            `num_processes` of the launcher
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brim.errors import Inexpressible
from brim.planner.record import Plan
from brim.spec.recipe import Lora, Quantization
from brim.tables.dialects import Dialect, find_learning_rate
from brim.tables.read import find_optimizer, find_task

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}
# torch before 2.10 reads the first only; later ones read both.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"
# Liger's switches for layers; models without one of them ignore it.
LIGER_LAYERS = ("rope", "rms_norm", "swiglu", "geglu", "layer_norm")

Words = dict[str, Any]


def name_batch(plan: Plan) -> Words:
    """Return the keywords of the batch; evaluation runs with the same micro-batch, as the plan costed it."""
    return {
        "per_device_train_batch_size": plan.strategy.micro_batch_size,
        "per_device_eval_batch_size": plan.strategy.micro_batch_size,
        "gradient_accumulation_steps": plan.strategy.gradient_accumulation_steps,
    }


def name_schedule(plan: Plan, dialect: Dialect) -> Words:
    """Return the keywords of the run's length, learning rate and warmup."""
    warmup: Words = {"warmup_steps": plan.schedule.warmup_steps}
    if plan.schedule.warmup_steps is None:
        warmup = {dialect.warmup_fraction: find_task(plan.workload.task).warmup_fraction}
    return {
        "num_train_epochs": plan.workload.num_epochs,
        "learning_rate": find_learning_rate(plan.workload.recipe.method),
        **warmup,
    }


def name_precision(plan: Plan) -> Words:
    """Return the autocast flags; both false means the model runs in the dtype it was loaded in."""
    recipe = plan.workload.recipe
    return {
        "bf16": recipe.autocast and recipe.compute_dtype == "bf16",
        "fp16": recipe.autocast and recipe.compute_dtype == "fp16",
    }


def name_optimizer(plan: Plan, target: str) -> Words:
    """Return the optimizer's HF name.

    Raises:
        Inexpressible: HF has no name for this optimizer with this kernel.
    """
    row = find_optimizer(plan.workload.recipe.optimizer)
    word = row.hf.get(plan.strategy.optimizer_kernel)
    if word is None:
        named = ", ".join(f"{kernel} ({name})" for kernel, name in row.hf.items())
        raise Inexpressible(
            target=target, setting=f"optimizer {row.name} with optimizer_kernel {plan.strategy.optimizer_kernel}",
            advice=f"kernels with a name: {named}" if named else "choose another optimizer, for example adamw",
        )  # fmt: skip
    return {"optim": word}


def name_checkpointing(plan: Plan, dialect: Dialect) -> Words:
    """Return the checkpointing flag, always explicit, and its options where it is on."""
    kind = plan.strategy.activation_checkpointing
    words: Words = {dialect.checkpointing: kind != "none"}
    if kind == "none" or not dialect.checkpointing_options:
        return words
    options: Words = {"use_reentrant": False}
    if kind == "selective":
        options["selective"] = True
    if plan.strategy.activation_offload and dialect.activation_offload == "offload":
        options["offload"] = True
    return {**words, dialect.checkpointing_options: options}


def name_liger(plan: Plan, dialect: Dialect) -> Words:
    """Return Liger's switches: layers, the fused loss, both, or nothing at all."""
    layers, loss = plan.strategy.layer_kernels == "liger", plan.strategy.loss_kernel == "fused"
    if "liger" not in dialect.layer_kernels or not (layers or loss):
        return {}
    switches = dict.fromkeys(LIGER_LAYERS, layers)
    return {
        "use_liger_kernel": True,
        "liger_kernel_config": {**switches, "cross_entropy": False, "fused_linear_cross_entropy": loss},
    }


def name_replicas(plan: Plan) -> Words:
    """Return DDP's keywords, empty on one rank."""
    return {"ddp_find_unused_parameters": False} if plan.strategy.mesh.data_parallel_size > 1 else {}


def name_constants(plan: Plan) -> Words:
    """Return what every export says alike: token-weighted averages, seed, nothing reported anywhere."""
    compiled: Words = {"torch_compile": True} if plan.strategy.compile else {}
    return {
        **compiled, "average_tokens_across_devices": True, "seed": 42, "report_to": "none",
        "logging_steps": 1, "save_strategy": "epoch",
    }  # fmt: skip


def name_loading(plan: Plan, dialect: Dialect) -> Words:
    """Return the keywords of from_pretrained, less quantisation."""
    return {
        dialect.dtype: DTYPES[plan.workload.recipe.weight_dtype],
        "attn_implementation": ATTENTION[plan.strategy.attention_kernel],
    }


def name_quantization(quantization: Quantization | None, compute_dtype: str, target: str) -> Words | None:
    """Return the keywords of BitsAndBytesConfig; None without one, or where the checkpoint carries its own.

    Raises:
        Inexpressible: storage bitsandbytes does not have.
    """
    if quantization is None or quantization.kind == "gptq-int4":
        return None
    if quantization.kind == "int8":
        return {"load_in_8bit": True}
    if quantization.kind == "fp8":
        raise Inexpressible(target=target, setting="fp8 storage of a frozen base", advice="use nf4 or int8")
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quantization.kind,
        "bnb_4bit_use_double_quant": quantization.double_quant,
        "bnb_4bit_compute_dtype": DTYPES[compute_dtype],
    }


def name_lora(lora: Lora | None) -> Words | None:
    """Return the keywords of LoraConfig, None for a full fine-tune."""
    if lora is None:
        return None
    whole = lora.target_modules == ("all-linear",)
    return {
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": "all-linear" if whole else list(lora.target_modules),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }


def name_surroundings(plan: Plan, target: str) -> Words:
    """Return what belongs to the launcher, the environment, PEFT and bitsandbytes."""
    recipe = plan.workload.recipe
    parts: Mapping[str, Any] = {
        "quantization_config": name_quantization(recipe.quantization, recipe.compute_dtype, target),
        "peft_config": name_lora(recipe.lora),
        ALLOCATOR_VARIABLES[0]: EXPANDABLE if plan.strategy.allocator == "expandable_segments" else None,
    }
    kept = {word: value for word, value in parts.items() if value is not None}
    return {"num_processes": plan.strategy.mesh.data_parallel_size, **kept}


def cpu_training(training: Mapping[str, Any], dialect: Dialect) -> Words:
    """Return the keywords a dry run on the CPU changes: what only a GPU's kernels can do."""
    swaps: Words = {}
    if any(part in training["optim"] for part in ("bnb", "8bit", "paged", "lion")):
        swaps["optim"] = "adamw_torch"
    for word in ("fp16", "use_liger_kernel", "torch_compile", "activation_offloading"):
        if training.get(word):
            swaps[word] = False
    if training.get("mixed_precision") == "fp16":
        swaps["mixed_precision"] = "no"
    options = training.get(dialect.checkpointing_options, {})
    if options.get("offload"):
        swaps[dialect.checkpointing_options] = {word: value for word, value in options.items() if word != "offload"}
    return swaps


def cpu_loading(loading: Mapping[str, Any], dialect: Dialect) -> Words:
    """Return the from_pretrained keywords a dry run on the CPU changes."""
    swaps: Words = {}
    if loading["attn_implementation"] == "flash_attention_2":
        swaps["attn_implementation"] = "sdpa"
    if loading[dialect.dtype] == "float16":
        swaps[dialect.dtype] = "float32"
    return swaps

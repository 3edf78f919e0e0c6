"""What a target cannot say: each refusal names the setting and the nearest way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from brim.errors import Inexpressible
from brim.planner.record import Plan
from brim.planner.target import PAIRS, PAIRS_ADVICE
from brim.tables.dialects import Dialect

Refusal = tuple[str, str]
"""A setting and the advice."""


def refuse_inexpressible(plan: Plan, dialect: Dialect) -> None:
    """Return if the dialect has a word for everything the plan says.

    Raises:
        Inexpressible: the first setting without a word.
    """
    for rule in (_method, _model, _mesh, _checkpointing, _kernels, _batching, _offloads, _precision):
        for setting, advice in rule(plan, dialect):
            raise Inexpressible(target=_speaker(dialect), setting=setting, advice=advice)


def _speaker(dialect: Dialect) -> str:
    """Return the target, with its versions unless it is the newest dialect."""
    return f"{dialect.target} ({dialect.versions})" if dialect.until else dialect.target


def _method(plan: Plan, dialect: Dialect) -> Iterator[Refusal]:
    if plan.workload.recipe.preference is not None:
        yield PAIRS, PAIRS_ADVICE
    if plan.workload.recipe.method not in ("full", "lora", "qlora"):
        yield f"method {plan.workload.recipe.method}", "exported scripts train all weights or LoRA adapters"


def _model(plan: Plan, dialect: Dialect) -> Iterator[Refusal]:
    model = plan.workload.model
    decoder = all(group.stack == "decoder" and group.cross_attention is None for group in model.groups)
    causal = all(group.attention.causal for group in model.groups)
    if not (model.head and model.vocab_size and decoder and causal):
        yield f"training {model.architecture}", "exported scripts train causal language models"


def _mesh(plan: Plan, dialect: Dialect) -> Iterator[Refusal]:
    mesh, stage = plan.strategy.mesh, plan.strategy.zero_stage
    for axis in ("cp", "tp", "pp", "ep"):
        if getattr(mesh, axis) != 1:
            yield f"mesh axis {axis} of {getattr(mesh, axis)}", "use data parallelism only"
    if stage not in dialect.zero_stages:
        yield f"ZeRO stage {stage}", "export to deepspeed"
    if stage == 0 and mesh.dp_shard != 1:
        yield f"sharding over {mesh.dp_shard} ranks without a ZeRO stage", "set zero_stage, or use dp_replicate"
    if stage > 0 and mesh.dp_replicate != 1:
        yield f"ZeRO stage {stage} with {mesh.dp_replicate} replicas", "put all ranks on dp_shard"


def _checkpointing(plan: Plan, dialect: Dialect) -> Iterator[Refusal]:
    strategy, kinds = plan.strategy, dialect.checkpointing_kinds
    if strategy.activation_checkpointing not in kinds:
        yield f"{strategy.activation_checkpointing} activation checkpointing", f"use {' or '.join(kinds)}"
    if not strategy.activation_offload:
        return
    # TRL moves whatever is saved; the others move the inputs of checkpointed layers, so there must be some.
    anything = dialect.activation_offload == "activation_offloading"
    if not dialect.activation_offload:
        yield "activation offload", "turn activation_offload off"
    elif strategy.activation_checkpointing != "full" and not anything:
        yield f"activation offload with {strategy.activation_checkpointing} checkpointing", "use full checkpointing"
    elif (tokens := plan.workload.data.seq_len) < dialect.activation_offload_min_tokens:
        least = dialect.activation_offload_min_tokens
        yield f"activation offload at {tokens} tokens", f"it offloads from {least} tokens on: turn it off"


def _kernels(plan: Plan, dialect: Dialect) -> Iterator[Refusal]:
    strategy = plan.strategy
    if strategy.loss_kernel not in dialect.loss_kernels:
        yield f"the {strategy.loss_kernel} loss", f"it has {_either(dialect.loss_kernels)}: {_replan(dialect)}"
    if strategy.layer_kernels not in dialect.layer_kernels:
        yield f"{strategy.layer_kernels} layer kernels", f"it has {_either(dialect.layer_kernels)}: {_replan(dialect)}"
    if dialect.target == "unsloth" and strategy.attention_kernel == "eager":
        yield "eager attention", "it chooses flash or sdpa itself"
    if strategy.compile and not dialect.compile:
        yield "compile", "turn compile off"


def _batching(plan: Plan, dialect: Dialect) -> Iterator[Refusal]:
    if plan.workload.data.packing and not dialect.packing:
        yield "packing", "export to trl, or plan without packing"
    if plan.strategy.padding_free and not dialect.padding_free:
        yield "padding-free batches", "turn padding_free off"


def _offloads(plan: Plan, dialect: Dialect) -> Iterator[Refusal]:
    kind, stage = plan.strategy.offload, plan.strategy.zero_stage
    if kind not in dialect.offloads:
        yield f"offload of the {_offloaded(kind)}", "export to deepspeed"
    elif kind != "none" and stage == 0:
        yield f"offload of the {_offloaded(kind)} at ZeRO stage 0", "use stage 1 or higher"
    elif kind == "parameters" and stage != 3:
        yield f"offload of the parameters at ZeRO stage {stage}", "use stage 3"


def _offloaded(kind: str) -> str:
    return "optimizer states" if kind == "optimizer" else kind


def _precision(plan: Plan, dialect: Dialect) -> Iterator[Refusal]:
    recipe = plan.workload.recipe
    if recipe.master_weights and dialect.target != "deepspeed":
        yield "fp32 master weights", "load the model in fp32, or export to deepspeed"
    narrow = recipe.method == "full" and recipe.weight_dtype != "fp32" and not recipe.master_weights
    if dialect.target == "deepspeed" and narrow:
        # Source: DeepSpeed runtime/bf16_optimizer.py and zero/stage_1_and_2.py, single_partition_of_fp32_groups.
        yield (
            f"full fine-tuning in {recipe.weight_dtype} without master weights",
            "it keeps fp32 master weights (4 bytes per parameter) and fp32 Adam states (8), more than was planned: "
            "plan with --dtype fp32 or --method lora, or export to transformers",
        )
    if recipe.gradient_dtype is not None:
        yield f"gradients in {recipe.gradient_dtype}", "leave gradient_dtype to the weights"
    if not recipe.autocast and recipe.compute_dtype != recipe.weight_dtype and recipe.quantization is None:
        yield f"{recipe.compute_dtype} products of {recipe.weight_dtype} weights without autocast", "turn autocast on"
    if dialect.target == "deepspeed" and recipe.quantization is not None and plan.strategy.zero_stage == 3:
        yield "a bitsandbytes base at ZeRO stage 3", "use stage 2 or lower"
    if dialect.target == "unsloth" and recipe.quantization is not None and recipe.quantization.kind != "nf4":
        yield f"{recipe.quantization.kind} storage", "use nf4"


def _either(words: object) -> str:
    return " or ".join(str(word) for word in words)  # type: ignore[attr-defined]


def _replan(dialect: Dialect) -> str:
    return f"plan again with --trainer {_TRAINERS.get(dialect.target, dialect.target)}"


_TRAINERS = {"deepspeed": "transformers"}

Rule = Callable[[Plan, Dialect], Iterator[Refusal]]

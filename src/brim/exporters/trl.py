"""TRL: SFTConfig and a script around SFTTrainer."""

from __future__ import annotations

from brim.exporters.record import Export
from brim.exporters.script import launch_torchrun, render_script, sample_file
from brim.exporters.words import (
    DTYPES,
    Words,
    name_batch,
    name_checkpointing,
    name_constants,
    name_liger,
    name_loading,
    name_optimizer,
    name_precision,
    name_replicas,
    name_schedule,
    name_surroundings,
)
from brim.planner.record import Plan
from brim.tables.dialects import Dialect
from brim.tables.read import find_trainer


def export_trl(plan: Plan, dialect: Dialect) -> Export:
    """Return the plan as SFTConfig keywords, a script and its launch line."""
    training, loading = name_sft(plan, dialect), name_loading(plan, dialect)
    outside = name_surroundings(plan, dialect.target)
    if _cuts_rows(plan):
        outside["max_length"] = plan.workload.data.seq_len
    launch = launch_torchrun(plan)
    script = render_script("trl.py.j2", plan, dialect, {
        "launch": launch, "training": training, "loading": loading, "outside": outside,
        "training_class": "trl.SFTConfig", "adapter_dtype": _foreign_adapter_dtype(plan),
        "selective_adapters": _has_selective_adapters(plan),
    })  # fmt: skip
    return Export(
        target=dialect.target, dialect=dialect.versions, keywords={**training, "model_init_kwargs": loading},
        outside=outside, files=(script, sample_file()), launch=launch, notes=(),
    )  # fmt: skip


def name_sft(plan: Plan, dialect: Dialect) -> Words:
    """Return the keywords of SFTConfig, less `model_init_kwargs`."""
    return {
        **name_batch(plan), **_name_length(plan, dialect), **name_schedule(plan, dialect),
        **name_optimizer(plan, dialect.target), **name_precision(plan), **name_checkpointing(plan, dialect),
        **_name_offload(plan, dialect), **_name_loss(plan, dialect), **name_liger(plan, dialect), **name_replicas(plan),
        **name_constants(plan),
    }  # fmt: skip


def _cuts_rows(plan: Plan) -> bool:
    """Return whether the script cuts rows: TRL refuses `max_length` with padding-free batches that are not packed."""
    return plan.strategy.padding_free and not plan.workload.data.packing


def _foreign_adapter_dtype(plan: Plan) -> str:
    """Return torch's name of the adapter dtype where it is not the one SFTTrainer takes, else nothing."""
    recipe, row = plan.workload.recipe, find_trainer("trl")
    if recipe.lora is None:
        return ""
    own = row.lora_adapter_dtype if recipe.quantization is None else row.qlora_adapter_dtype
    return "" if recipe.lora.dtype == own else DTYPES[recipe.lora.dtype]


def _has_selective_adapters(plan: Plan) -> bool:
    return plan.strategy.activation_checkpointing == "selective" and plan.workload.recipe.lora is not None


def _name_length(plan: Plan, dialect: Dialect) -> Words:
    seq_len = None if _cuts_rows(plan) else plan.workload.data.seq_len
    words: Words = {str(dialect.length): seq_len, "packing": plan.workload.data.packing}
    if dialect.length == "max_length":  # both words came with trl 0.16
        words["padding_free"] = plan.strategy.padding_free
    if plan.workload.data.packing:
        words["packing_strategy"] = "bfd"
    return words


def _name_offload(plan: Plan, dialect: Dialect) -> Words:
    """Return TRL's own offload flag, always explicit; Unsloth's travels with its checkpointing word instead."""
    word = dialect.activation_offload
    return {word: plan.strategy.activation_offload} if word == "activation_offloading" else {}


def _name_loss(plan: Plan, dialect: Dialect) -> Words:
    word = dialect.loss_kernels[plan.strategy.loss_kernel]
    return {"loss_type": word} if word else {}

"""Unsloth: FastLanguageModel, its adapters, and TRL's trainer as Unsloth patches it.

Two words are Unsloth's own. `use_gradient_checkpointing` is False, True, or "unsloth": recompute and keep layer inputs
in host memory. The attention kernel is Unsloth's choice (flash where installed, else sdpa); `attn_implementation`
travels along and is ignored by it.
"""

from __future__ import annotations

from brim.exporters.record import Export
from brim.exporters.script import launch_torchrun, render_script, sample_file
from brim.exporters.trl import name_sft
from brim.exporters.words import (
    ALLOCATOR_VARIABLES,
    DTYPES,
    EXPANDABLE,
    Words,
    name_loading,
    name_lora,
    name_surroundings,
)
from brim.planner.record import Plan
from brim.tables.dialects import Dialect


def export_unsloth(plan: Plan, dialect: Dialect) -> Export:
    """Return the plan as SFTConfig keywords, a script around FastLanguageModel and its launch line."""
    training, loading = name_sft(plan, dialect), name_fast_model(plan, dialect)
    outside: Words = {**name_surroundings(plan, dialect.target), **name_environment(plan), **loading}
    if plan.workload.recipe.lora is not None:
        outside["peft_config"] = name_fast_lora(plan)
    launch = launch_torchrun(plan)
    script = render_script("unsloth.py.j2", plan, dialect, {
        "launch": launch, "training": training, "loading": loading, "outside": outside,
        "training_class": "trl.SFTConfig", "lora_call": "FastLanguageModel.get_peft_model",
        "adapter_dtype": "", "loads_tokenizer": False,
    })  # fmt: skip
    return Export(
        target=dialect.target, dialect=dialect.versions, keywords=training, outside=outside,
        files=(script, sample_file()), launch=launch, notes=_note_dtype(plan),
    )  # fmt: skip


def name_environment(plan: Plan) -> Words:
    """Return the environment: no statistics are sent, and Unsloth does not choose the allocator."""
    # Unsloth turns expandable segments on by itself: a native allocator has to be asked for.
    mode = EXPANDABLE if plan.strategy.allocator == "expandable_segments" else "expandable_segments:False"
    return {**dict.fromkeys(ALLOCATOR_VARIABLES, mode), "UNSLOTH_DISABLE_STATISTICS": "1"}


def name_fast_model(plan: Plan, dialect: Dialect) -> Words:
    """Return the keywords of FastLanguageModel.from_pretrained."""
    recipe = plan.workload.recipe
    full = recipe.method == "full"
    # A full fine-tune is loaded in the compute dtype; fp32 weights under autocast have a word of their own.
    masters = {"float32_mixed_precision": recipe.weight_dtype == "fp32"} if full else {}
    return {
        **name_loading(plan, dialect),
        **({dialect.dtype: DTYPES[recipe.compute_dtype]} if full else {}),
        "max_seq_length": plan.workload.data.seq_len,
        "load_in_4bit": recipe.quantization is not None,
        "load_in_8bit": False,
        "full_finetuning": full,
        **masters,
        "use_gradient_checkpointing": _name_checkpointing(plan),
    }


def name_fast_lora(plan: Plan) -> Words:
    """Return the keywords of FastLanguageModel.get_peft_model, which sets the task type itself."""
    words = name_lora(plan.workload.recipe.lora) or {}
    kept = {word: value for word, value in words.items() if word not in ("task_type", "use_dora") or value is True}
    return {**kept, "random_state": 42, "use_gradient_checkpointing": _name_checkpointing(plan)}


def _name_checkpointing(plan: Plan) -> bool | str:
    if plan.strategy.activation_checkpointing == "none":
        return False
    return "unsloth" if plan.strategy.activation_offload else True


def _note_dtype(plan: Plan) -> tuple[str, ...]:
    if plan.workload.recipe.method == "full" and plan.workload.recipe.compute_dtype == "fp16":
        return ("Unsloth upcasts fp16 weights to fp32 for full fine-tuning.",)
    return ()

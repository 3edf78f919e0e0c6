"""transformers: TrainingArguments and a script around Trainer; DeepSpeed runs the same script with its own file."""

from __future__ import annotations

from brim.exporters.record import Export, ExportFile
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


def export_transformers(plan: Plan, dialect: Dialect) -> Export:
    """Return the plan as TrainingArguments keywords, a script and its launch line."""
    training, outside = name_training(plan, dialect), name_outside(plan, dialect)
    launch = launch_torchrun(plan)
    return Export(
        target=dialect.target, dialect=dialect.versions, keywords=training, outside=outside,
        files=(render_trainer(plan, dialect, training, outside, launch), sample_file()), launch=launch,
        notes=note_loss(plan),
    )  # fmt: skip


def name_training(plan: Plan, dialect: Dialect) -> Words:
    """Return the keywords of TrainingArguments."""
    return {
        **name_batch(plan), **name_schedule(plan, dialect), **name_optimizer(plan, dialect.target),
        **name_precision(plan), **name_checkpointing(plan, dialect), **name_liger(plan, dialect), **name_replicas(plan),
        **name_constants(plan),
    }  # fmt: skip


def name_outside(plan: Plan, dialect: Dialect) -> Words:
    """Return what TrainingArguments has no field for: how the model loads, how rows are cut and collated."""
    return {
        **name_loading(plan, dialect), "max_length": plan.workload.data.seq_len,
        "padding_free": plan.strategy.padding_free, **name_surroundings(plan, dialect.target),
    }  # fmt: skip


def render_trainer(
    plan: Plan, dialect: Dialect, training: Words, outside: Words, launch: str, *, deepspeed: str = ""
) -> ExportFile:
    """Return the script; `deepspeed` names the config file beside it."""
    return render_script("trainer.py.j2", plan, dialect, {
        "launch": launch, "training": training, "loading": name_loading(plan, dialect), "outside": outside,
        "training_class": "transformers.TrainingArguments", "adapter_dtype": adapter_dtype(plan),
        "deepspeed": deepspeed, "gpu_only": "DeepSpeed" if deepspeed else "", "checkpoints_here": False,
        "collator": "DataCollatorWithFlattening" if plan.strategy.padding_free else "DataCollatorForSeq2Seq",
    })  # fmt: skip


def adapter_dtype(plan: Plan) -> str:
    """Return torch's name of the adapter dtype where it is not PEFT's own fp32, else nothing."""
    lora = plan.workload.recipe.lora
    return "" if lora is None or lora.dtype == "fp32" else DTYPES[lora.dtype]


def note_loss(plan: Plan) -> tuple[str, ...]:
    """Return a warning for heads whose target tokens Trainer miscounts.

    Source: transformers 5.23.0 trainer.py `_loss_shifts_labels`; measured 1.8-2.5 % on GPT-2 (facts/accumulation.md).
    """
    if plan.workload.model.architecture.endswith(("ForCausalLM", "ForConditionalGeneration")):
        return ()
    return (
        f"Trainer counts the first label of {plan.workload.model.architecture} as a target: gradients are about 2 % "
        "small, at every micro-batch alike.",
    )

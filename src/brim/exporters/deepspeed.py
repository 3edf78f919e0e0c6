"""DeepSpeed: its JSON, in numbers only, and the Trainer script that runs with it."""

from __future__ import annotations

import json

from brim.exporters.record import Export, ExportFile
from brim.exporters.script import MASTER_PORT, SCRIPT_NAME, name_allocator, sample_file
from brim.exporters.trainer import name_outside, name_training, note_loss, render_trainer
from brim.exporters.words import Words
from brim.planner.record import Plan
from brim.tables.dialects import Dialect

CONFIG_NAME = "ds_config.json"

BUCKETS = {"reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000}
"""Elements per collective. Source: DeepSpeed 0.19.8 runtime/zero/config.py defaults."""
STAGE_3 = {
    "sub_group_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_gather_16bit_weights_on_model_save": True,
}
"""Source: as above; the last one so that the result is saved as ordinary weights."""


def export_deepspeed(plan: Plan, dialect: Dialect) -> Export:
    """Return the plan as TrainingArguments keywords whose `deepspeed` is the JSON, the files and the launch line."""
    training, outside = name_training(plan, dialect), name_outside(plan, dialect)
    config = name_deepspeed(plan, training)
    launch = launch_deepspeed(plan)
    script = render_trainer(plan, dialect, training, outside, launch, deepspeed=CONFIG_NAME)
    written = ExportFile(name=CONFIG_NAME, text=json.dumps(config, indent=2) + "\n")
    return Export(
        target=dialect.target, dialect=dialect.versions, keywords={**training, "deepspeed": config}, outside=outside,
        files=(script, written, sample_file()), launch=launch, notes=(*note_loss(plan), *_note_precision(plan)),
    )  # fmt: skip


def name_deepspeed(plan: Plan, training: Words) -> Words:
    """Return the JSON: batch, precision, clipping and ZeRO, nothing left to `auto`."""
    return {
        "train_batch_size": plan.effective_batch_size,
        "train_micro_batch_size_per_gpu": plan.strategy.micro_batch_size,
        "gradient_accumulation_steps": plan.strategy.gradient_accumulation_steps,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": training["bf16"]},
        "fp16": {"enabled": training["fp16"]},
        "zero_optimization": _name_zero(plan),
        **_name_optimizer(plan, training),
    }


def launch_deepspeed(plan: Plan) -> str:
    """Return DeepSpeed's launch line; several nodes need a hostfile."""
    cluster = plan.workload.cluster
    nodes = f"--hostfile HOSTFILE --master_port {MASTER_PORT} " if cluster.num_nodes > 1 else ""
    ranks = plan.strategy.mesh.data_parallel_size
    per_node = cluster.devices_per_node if cluster.num_nodes > 1 else ranks
    # The script reads LOCAL_RANK; by default the launcher adds an argument too.
    return f"{name_allocator(plan)}deepspeed --no_local_rank {nodes}--num_gpus {per_node} {SCRIPT_NAME}"


def _name_zero(plan: Plan) -> Words:
    stage, offload = plan.strategy.zero_stage, plan.strategy.offload
    words: Words = {"stage": stage}
    if stage > 0:
        words |= {"overlap_comm": True, "contiguous_gradients": True, "reduce_scatter": True, **BUCKETS}
    if stage == 3:
        words |= STAGE_3
    if offload != "none":
        words["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload == "parameters":
        words["offload_param"] = {"device": "cpu", "pin_memory": True}
    return words


def _name_optimizer(plan: Plan, training: Words) -> Words:
    """Return DeepSpeed's own AdamW for offloaded states: it refuses torch's on the CPU unless told otherwise."""
    if plan.strategy.offload == "none":
        return {}
    if plan.workload.recipe.optimizer != "adamw":
        return {"zero_force_ds_cpu_optimizer": False}
    numbers = {"lr": training["learning_rate"], "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    return {"optimizer": {"type": "AdamW", "params": numbers}}


def _note_precision(plan: Plan) -> tuple[str, ...]:
    """Return what DeepSpeed makes of trained fp32 weights under autocast: fp32 adapters, or fp32 full weights.

    Source: DeepSpeed 0.19.8 runtime/engine.py _configure_distributed_model casts the whole module to bf16 or fp16;
    runtime/bf16_optimizer.py and runtime/zero keep the fp32 copies.
    """
    recipe = plan.workload.recipe
    if recipe.master_weights or not recipe.autocast:
        return ()
    what = "weights" if recipe.method == "full" else "adapters"
    return (
        f"DeepSpeed casts the {what} to {recipe.compute_dtype} and keeps fp32 copies of them and of their gradients: "
        "up to 4 bytes per trained parameter more than planned.",
    )

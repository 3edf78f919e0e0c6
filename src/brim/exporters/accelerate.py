"""Accelerate: its yaml, and a loop of brim's own whose accumulation is exact."""

from __future__ import annotations

from brim.exporters.record import Export, ExportFile
from brim.exporters.script import MASTER_PORT, SCRIPT_NAME, name_allocator, render_script, sample_file
from brim.exporters.trainer import adapter_dtype
from brim.exporters.words import (
    Words,
    name_batch,
    name_checkpointing,
    name_loading,
    name_optimizer,
    name_precision,
    name_schedule,
    name_surroundings,
)
from brim.planner.record import Plan
from brim.tables.dialects import Dialect

CONFIG_NAME = "accelerate.yaml"

OPTIMIZERS = {
    "adamw_torch_fused": ("", "torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=True)"),
    "adamw_torch": ("", "torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, foreach=True)"),
    "sgd": ("", "torch.optim.SGD(weights, lr=rate, foreach=True)"),
    "adafactor": (
        "from transformers import Adafactor",
        "Adafactor(weights, lr=rate, scale_parameter=False, relative_step=False)",
    ),
    "adamw_bnb_8bit": ("from bitsandbytes.optim import AdamW8bit", "AdamW8bit(weights, lr=rate, weight_decay=0.0)"),
    "paged_adamw_8bit": (
        "from bitsandbytes.optim import PagedAdamW8bit", "PagedAdamW8bit(weights, lr=rate, weight_decay=0.0)",
    ),
    "paged_adamw_32bit": (
        "from bitsandbytes.optim import PagedAdamW32bit", "PagedAdamW32bit(weights, lr=rate, weight_decay=0.0)",
    ),
    "lion_32bit": ("from bitsandbytes.optim import Lion32bit", "Lion32bit(weights, lr=rate)"),
    "lion_8bit": ("from bitsandbytes.optim import Lion8bit", "Lion8bit(weights, lr=rate)"),
}  # fmt: skip
"""Import and call for each HF optimizer name, with HF's weight decay of 0."""


def export_accelerate(plan: Plan, dialect: Dialect) -> Export:
    """Return the plan as the loop's settings with the yaml under `accelerate`, the files and the launch line."""
    training, loading = name_loop(plan, dialect), name_loading(plan, dialect)
    outside = {**loading, "max_length": plan.workload.data.seq_len, **name_surroundings(plan, dialect.target)}
    config, launch = name_accelerate(plan, training), launch_accelerate(plan)
    optimizer_import, optimizer_call = OPTIMIZERS[training["optim"]]
    selective = plan.strategy.activation_checkpointing == "selective"
    script = render_script("accelerate.py.j2", plan, dialect, {
        "launch": launch, "training": training, "loading": loading, "outside": outside,
        "training_class": "the loop below, named as in transformers", "adapter_dtype": adapter_dtype(plan),
        "checkpoints_here": training[dialect.checkpointing], "enable_call": f"{dialect.checkpointing}_enable",
        "checkpointing_options": dialect.checkpointing_options,
        "early_imports": ("from contextlib import nullcontext", *(["from functools import partial"] * selective)),
        "late_imports": ("from itertools import islice", "from math import ceil"),
        "optimizer_import": optimizer_import, "optimizer_call": optimizer_call,
    })  # fmt: skip
    return Export(
        target=dialect.target, dialect=dialect.versions, keywords={**training, "accelerate": config}, outside=outside,
        files=(script, ExportFile(name=CONFIG_NAME, text=_write_yaml(config)), sample_file()), launch=launch, notes=(),
    )  # fmt: skip


def name_loop(plan: Plan, dialect: Dialect) -> Words:
    """Return the settings of the loop, by the names transformers gives them."""
    flags = name_precision(plan)
    return {
        **name_batch(plan), **name_schedule(plan, dialect), **name_optimizer(plan, dialect.target),
        "max_grad_norm": 1.0, "mixed_precision": "bf16" if flags["bf16"] else "fp16" if flags["fp16"] else "no",
        **name_checkpointing(plan, dialect), **({"torch_compile": True} if plan.strategy.compile else {}), "seed": 42,
    }  # fmt: skip


def name_accelerate(plan: Plan, training: Words) -> Words:
    """Return the keys of accelerate's yaml."""
    cluster, ranks = plan.workload.cluster, plan.strategy.mesh.data_parallel_size
    return {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "MULTI_GPU" if ranks > 1 else "NO",
        "downcast_bf16": "no",
        "enable_cpu_affinity": False,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": training["mixed_precision"],
        "num_machines": cluster.num_nodes,
        "num_processes": ranks,
        "rdzv_backend": "c10d" if cluster.num_nodes > 1 else "static",
        "same_network": True,
        "use_cpu": False,
    }


def launch_accelerate(plan: Plan) -> str:
    """Return accelerate's launch line; on several nodes the rank of each machine comes from the rendezvous."""
    several = plan.workload.cluster.num_nodes > 1
    head = f"--main_process_ip HEAD_NODE --main_process_port {MASTER_PORT} " if several else ""
    return f"{name_allocator(plan)}accelerate launch --config_file {CONFIG_NAME} {head}{SCRIPT_NAME}"


def _write_yaml(config: Words) -> str:
    import yaml

    return yaml.safe_dump(config, sort_keys=True)

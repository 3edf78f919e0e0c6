"""Plans made by hand from the spec, so that exporters are tested without the planner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from brim.cost.ledger import Estimate, Ledger, Moment
from brim.planner.record import Plan, Schedule
from brim.spec.data import DataProfile
from brim.spec.device import Cluster, Device
from brim.spec.model import Attention, LayerGroup, Linear, Mlp, ModelShape
from brim.spec.recipe import Engine, Lora, Method, Quantization, Recipe
from brim.spec.strategy import Mesh, Strategy
from brim.spec.workload import BatchTarget, Workload
from brim.tables.read import find_trainer

GIB = 2**30
TRAINERS = {
    "trl": "trl", "transformers": "transformers", "deepspeed": "transformers", "accelerate": "accelerate",
    "unsloth": "unsloth",
}  # fmt: skip
LOSSES = {"trl": "chunked", "unsloth": "fused"}
"""Loss kernel of each target's trainer; dense elsewhere."""


def make_shape(name: str = "meta-llama/Llama-3.1-8B", **changes: Any) -> ModelShape:
    """Return a decoder of 32 layers."""
    attention = Attention(
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, v_head_dim=128,
        linears=(Linear(name="q_proj", in_features=4096, out_features=4096),),
    )  # fmt: skip
    mlp = Mlp(
        intermediate_size=14336, gated=True, hidden_act="silu",
        linears=(Linear(name="up_proj", in_features=4096, out_features=14336),),
    )  # fmt: skip
    group = LayerGroup(count=32, attention=attention, mlp=mlp, norm="rmsnorm", num_norms=2, hidden_size=4096)
    values: dict[str, Any] = {
        "name": name, "model_type": "llama", "architecture": "LlamaForCausalLM", "hidden_size": 4096,
        "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False, "embeddings": (),
        "groups": (group,), "head": (Linear(name="lm_head", in_features=4096, out_features=128256),),
        "final_norm": "rmsnorm",
    }  # fmt: skip
    return ModelShape(**{**values, **changes})


def make_recipe(method: Method = "qlora", trainer: str = "trl", dtype: Any = "bf16", **changes: Any) -> Recipe:
    """Return the recipe a trainer preset gives a method."""
    row = find_trainer(trainer)
    adapter = row.qlora_adapter_dtype if method == "qlora" else row.lora_adapter_dtype
    lora = Lora(r=16, alpha=32.0, target_modules=("q_proj", "v_proj"), dtype=adapter)
    values: dict[str, Any] = {
        "method": method, "weight_dtype": dtype, "compute_dtype": dtype, "autocast": dtype != "fp32",
        "engine": Engine(name=trainer), "lora": None if method == "full" else lora,
        "quantization": Quantization(kind="nf4", double_quant=True, upcast_rest=row.kbit_upcast)
        if method == "qlora" else None,
    }  # fmt: skip
    return Recipe(**{**values, **changes})


def make_estimate() -> Estimate:
    """Return an estimate with one moment."""
    peak = 17 * GIB
    return Estimate(
        source="formula", moments=(Moment(name="loss", ledger=Ledger(parameters=peak)),), peak_allocated_bytes=peak,
        peak_reserved_bytes=peak, device_bytes=18 * GIB, peak_moment="loss",
    )  # fmt: skip


def make_strategy(target: str = "trl", **changes: Any) -> Strategy:
    """Return a strategy every target of that name can express."""
    values: dict[str, Any] = {
        "micro_batch_size": 4, "gradient_accumulation_steps": 8, "activation_checkpointing": "full",
        "loss_kernel": LOSSES.get(target, "dense"), "layer_kernels": "unsloth" if target == "unsloth" else "none",
    }  # fmt: skip
    return Strategy(**{**values, **changes})


def make_plan(
    target: str = "trl", *, method: Method = "lora", name: str = "meta-llama/Llama-3.1-8B", seq_len: int = 1024,
    packing: bool = False, warmup_steps: int | None = 5, recipe: Recipe | None = None, num_nodes: int = 1,
    shape: ModelShape | None = None, **knobs: Any,
) -> Plan:  # fmt: skip
    """Return a plan for a target; `knobs` are fields of its strategy."""
    strategy = make_strategy(target, **knobs)
    masters = target == "deepspeed" and method == "full"  # DeepSpeed cannot do without
    ranks = strategy.mesh.data_parallel_size
    effective = strategy.micro_batch_size * strategy.gradient_accumulation_steps * ranks
    device = Device(name="rtx-4090", capacity_bytes=round(23.5 * GIB))
    workload = Workload(
        model=shape or make_shape(name), data=DataProfile(seq_len=seq_len, packing=packing),
        recipe=recipe or make_recipe(method, TRAINERS[target], master_weights=masters),
        task="instruction-tuning", num_epochs=2.0,
        batch=BatchTarget(
            sequences=effective, tokens=effective * seq_len, low=32, high=64, min_useful=8, max_useful=128, reason=""
        ),
        cluster=Cluster(device=device, devices_per_node=max(ranks // num_nodes, 1), num_nodes=num_nodes),
    )  # fmt: skip
    schedule = Schedule(
        num_sequences=None, steps_per_epoch=None, total_steps=None, warmup_steps=warmup_steps,
        sequences_per_step=effective, tokens_per_step=effective * seq_len, epoch_seconds=None, note="",
    )  # fmt: skip
    return Plan(
        workload=workload, strategy=strategy, estimate=make_estimate(), effective_batch_size=effective,
        effective_batch_tokens=effective * seq_len, budget_bytes=20 * GIB, capacity_bytes=24 * GIB, reasons=(),
        assumptions=(), warnings=(), schedule=schedule, rejected=(), brim_version="0.1.0",
    )  # fmt: skip


def with_ranks(target: str, ranks: int, stage: int = 0) -> dict[str, Any]:
    """Return the knobs of a data-parallel mesh: replicas, or shards from ZeRO stage 1 on."""
    mesh = Mesh(dp_shard=ranks) if stage else Mesh(dp_replicate=ranks)
    return {"mesh": mesh, "zero_stage": stage}


__all__ = ["GIB", "TRAINERS", "make_plan", "make_recipe", "make_shape", "make_strategy", "replace", "with_ranks"]

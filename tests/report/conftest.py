"""Plans made by hand, so that the report is tested without the planner."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from brim.cost.ledger import Estimate, Ledger, Moment, StepTime
from brim.errors import DoesNotFit
from brim.planner.record import Plan, PlanWarning, Rejected, Relaxation, Schedule
from brim.spec.data import DataProfile
from brim.spec.device import Cluster, Device
from brim.spec.model import Attention, LayerGroup, Linear, Mlp, ModelShape
from brim.spec.recipe import Engine, Lora, Quantization, Recipe
from brim.spec.strategy import Strategy
from brim.spec.workload import BatchTarget, Workload

GIB = 2**30


def make_model(name: str = "meta-llama/Llama-3.1-8B") -> ModelShape:
    """Return a small but whole model shape."""
    attention = Attention(
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, v_head_dim=128,
        linears=(Linear(name="q_proj", in_features=4096, out_features=4096),),
    )  # fmt: skip
    mlp = Mlp(
        intermediate_size=14336, gated=True, hidden_act="silu",
        linears=(Linear(name="up_proj", in_features=4096, out_features=14336),),
    )  # fmt: skip
    group = LayerGroup(count=32, attention=attention, mlp=mlp, norm="rmsnorm", num_norms=2, hidden_size=4096)
    return ModelShape(
        name=name, model_type="llama", architecture="LlamaForCausalLM", hidden_size=4096, vocab_size=128256,
        max_position_embeddings=131072, tie_word_embeddings=False, embeddings=(), groups=(group,),
        head=(Linear(name="lm_head", in_features=4096, out_features=128256),), final_norm="rmsnorm",
    )  # fmt: skip


def make_ledger(scale: float = 1.0, **rows: float) -> Ledger:
    """Return a ledger given in GiB."""
    gib = {"parameters": 5.63, "optimizer_states": 0.16, "gradients": 0.08, "activations": 4.1, **rows}
    return Ledger(**{row: round(value * scale * GIB) for row, value in gib.items()})


def make_estimate(source: str = "formula", **changes: Any) -> Estimate:
    """Return an estimate of three moments."""
    moments = (
        Moment(name="end of forward", ledger=make_ledger(activations=6.2, inputs=0.0001, overhead=0.03)),
        Moment(name="loss", ledger=make_ledger(activations=6.2, temporaries=4.7, inputs=0.0001, overhead=0.03)),
        Moment(name="backward of layers 0-31", ledger=make_ledger(activations=4.0, temporaries=1.1, overhead=0.03)),
        Moment(name="optimizer step", ledger=make_ledger(activations=0, temporaries=0.16, overhead=0.03)),
    )
    peak = max(moments, key=lambda moment: moment.total_bytes)
    values: dict[str, Any] = {
        "source": source, "moments": moments, "peak_allocated_bytes": peak.total_bytes,
        "peak_reserved_bytes": round(peak.total_bytes * 1.04),
        "device_bytes": round(peak.total_bytes * 1.04 + 0.6 * GIB),
        "peak_moment": peak.name, "margin_bytes": round(0.9 * GIB), "notes": ("The tied head is kept in bf16.",),
        "step_time": StepTime(
            fixed_seconds=0.03, micro_batch_seconds=0.79, step_seconds=6.35, tokens_per_second_per_device=10320.0
        ),
    }  # fmt: skip
    return Estimate(**{**values, **changes})


def make_workload(**changes: Any) -> Workload:
    """Return QLoRA of an 8B model on one 24 GB card."""
    values: dict[str, Any] = {
        "model": make_model(), "task": "instruction-tuning", "num_epochs": 3.0,
        "data": DataProfile(name="tatsu-lab/alpaca", num_sequences=52002, seq_len=2048),
        "recipe": Recipe(
            method="qlora", engine=Engine(name="trl"), lora=Lora(r=16, alpha=32.0, target_modules=("all-linear",)),
            quantization=Quantization(kind="nf4", double_quant=True),
        ),
        "batch": BatchTarget(
            sequences=32, tokens=65536, low=32, high=64, min_useful=8, max_useful=128,
            reason="low end of the optimal range of instruction-tuning",
        ),
        "cluster": Cluster(device=Device(name="rtx-4090", capacity_bytes=round(23.5 * GIB))),
    }  # fmt: skip
    return Workload(**{**values, **changes})


def make_rejected() -> tuple[Rejected, ...]:
    """Return one alternative of each kind."""
    chosen = Strategy(micro_batch_size=4, gradient_accumulation_steps=8, activation_checkpointing="selective")
    rows = (
        (2, 16, "none", 17.9, 1.004, -2.9, "same speed within 3 %, higher peak"),
        (2, 16, "selective", 14.2, 1.03, -6.6, "slower"),
        (8, 4, "full", 19.8, 1.21, -1.0, "slower: recomputes every layer"),
        (8, 4, "selective", 25.6, 0.98, 4.8, "over budget by 4.80 GiB at the loss"),
        (32, 1, "full", 46.1, None, 25.3, "over budget by 25.3 GiB at the loss"),
    )
    return tuple(
        Rejected(
            strategy=replace(
                chosen, micro_batch_size=micro, gradient_accumulation_steps=steps, activation_checkpointing=kind
            ),
            peak_allocated_bytes=round(peak * GIB), relative_step_time=time,
            over_bytes=round(over * GIB), reason=reason,
        )
        for micro, steps, kind, peak, time, over, reason in rows
    )  # fmt: skip


def make_plan(**changes: Any) -> Plan:
    """Return a whole plan; `changes` replace fields."""
    values: dict[str, Any] = {
        "workload": make_workload(), "estimate": make_estimate(), "effective_batch_size": 32,
        "strategy": Strategy(micro_batch_size=4, gradient_accumulation_steps=8, activation_checkpointing="selective"),
        "effective_batch_tokens": 65536, "budget_bytes": round(20.8 * GIB), "capacity_bytes": round(23.5 * GIB),
        "reasons": (
            "the loss limits: logits of 4 x 2,048 tokens over 128,256 words",
            "selective checkpointing: none would need 4.10 GiB more than the budget",
        ),
        "assumptions": (
            "sequence length 2,048: the smaller of 2,048 and the model's 131,072 positions",
            "effective batch 32: the low end of the optimal range 32-64 of instruction-tuning",
        ),
        "warnings": (PlanWarning(code="padding", text="43 % of tokens may be padding; packing avoids it"),),
        "schedule": Schedule(
            num_sequences=52002, steps_per_epoch=1626, total_steps=4878, warmup_steps=146, sequences_per_step=32,
            tokens_per_step=65536, epoch_seconds=10325.0,
            note="In the HF Trainer, logging_steps and eval_steps count optimizer steps, not micro-batches.",
        ),
        "rejected": make_rejected(), "num_candidates": 96, "brim_version": "0.1.0",
    }  # fmt: skip
    return Plan(**{**values, **changes})


def make_refusal() -> DoesNotFit:
    """Return an error with three relaxations."""
    return DoesNotFit(
        "full fine-tuning of an 8B model does not fit one rtx-4090: the smallest strategy needs 61.2 GiB at the "
        "optimizer step, 40.4 GiB more than the budget of 20.8 GiB",
        gap_bytes=round(40.4 * GIB), at_moment="optimizer step", budget_bytes=round(20.8 * GIB),
        relaxations=(
            Relaxation(
                change="--optimizer adamw-8bit", effect="optimizer states in 8 bit; small loss of precision",
                peak_allocated_bytes=round(32.0 * GIB), fits=False,
            ),
            Relaxation(
                change="--method lora", effect="trains 0.5 % of the weights",
                peak_allocated_bytes=round(18.4 * GIB), fits=True,
            ),
            Relaxation(
                change="--method qlora", effect="trains adapters on a 4-bit base",
                peak_allocated_bytes=round(9.1 * GIB), fits=True,
            ),
        ),
    )  # fmt: skip


@pytest.fixture
def plans() -> Any:
    """Return the names of this module: its `make_*` functions build the records."""
    return SimpleNamespace(**globals())


@pytest.fixture
def render() -> Callable[..., str]:
    """Return a function that renders a report the way a pipe gets it."""

    def as_text(report: Any, width: int = 100, encoding: str = "utf-8") -> str:
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding)
        console = Console(file=stream, width=width, highlight=False, markup=False, emoji=False)
        console.print(report)
        stream.flush()
        return "\n".join(line.rstrip() for line in raw.getvalue().decode(encoding).splitlines())

    return as_text

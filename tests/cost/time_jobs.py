"""Jobs and strategies the tests of the time law share."""

from __future__ import annotations

from functools import cache
from typing import Any

from brim.readers.hf_config import read_config
from brim.spec.data import DataProfile
from brim.spec.device import Cluster
from brim.spec.model import ModelShape
from brim.spec.recipe import Engine, Lora, Quantization, Recipe
from brim.spec.strategy import Strategy
from brim.spec.workload import BatchTarget, Workload
from brim.tables.read import find_card, find_device

EVERY_MATRIX = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@cache
def read_card(name: str) -> ModelShape:
    """Return the shape of a built-in card."""
    card = find_card(name)
    assert card is not None
    return read_config(card.config, name=card.id)


def job(
    *, model: str = "meta-llama/Llama-3.1-8B", gpu: str = "a100-80gb", devices: int = 1, method: str = "full",
    seq_len: int = 2048, **recipe: Any,
) -> Workload:  # fmt: skip
    """Return a job; adapters sit on every matrix."""
    adapter = Lora(r=16, alpha=32, target_modules=EVERY_MATRIX, dtype="bf16") if method != "full" else None
    chosen = {
        "lora": adapter, "quantization": Quantization(kind="nf4", double_quant=True) if method == "qlora" else None,
        "engine": Engine(name="trl"),
    } | recipe  # fmt: skip
    batch = BatchTarget(sequences=32, tokens=32 * seq_len, low=1, high=64, min_useful=1, max_useful=128, reason="test")
    return Workload(
        model=read_card(model), data=DataProfile(seq_len=seq_len, packing=True),
        recipe=Recipe(method=method, **chosen),  # type: ignore[arg-type]
        batch=batch,
        cluster=Cluster(device=find_device(gpu), devices_per_node=devices), task="instruction-tuning",
    )  # fmt: skip


def way(micro_batch_size: int = 4, gradient_accumulation_steps: int = 1, **knobs: Any) -> Strategy:
    """Return a strategy with flash attention, everything else at its default."""
    return Strategy(
        micro_batch_size=micro_batch_size, gradient_accumulation_steps=gradient_accumulation_steps,
        **({"attention_kernel": "flash"} | knobs),
    )  # fmt: skip

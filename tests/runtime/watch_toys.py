"""A meter and a clock that say what a test wants, and a small job with its plan."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import brim
from brim.devices.meter import Reading
from brim.planner.record import Plan
from brim.units import MIB

LENGTH = 128
SIZES = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 2048,
}  # fmt: skip


class FakeMeter:
    """Counters that are set by hand; a peak stands until it is reset."""

    name, capacity_bytes = "toy", 1000 * MIB

    def __init__(self) -> None:
        self.allocated = self.peak = self.reserved = 0
        self.retries = self.ooms = self.num_resets = 0
        self.fails = False

    def take(self, peak: int, reserved: int | None = None) -> None:
        self.peak = max(self.peak, peak)
        self.reserved = max(self.reserved, reserved if reserved is not None else peak)

    def read(self) -> Reading:
        if self.fails:
            raise RuntimeError("driver is gone")
        return Reading(
            allocated_bytes=self.allocated, peak_allocated_bytes=self.peak, reserved_bytes=self.reserved,
            peak_reserved_bytes=self.reserved, device_bytes=self.reserved, num_retries=self.retries, num_ooms=self.ooms,
        )  # fmt: skip

    def reset_peak(self) -> None:
        self.peak, self.num_resets = self.allocated, self.num_resets + 1

    def release(self) -> None: ...

    def wait(self) -> None: ...


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@cache
def plan_job(micro: int = 2, accumulation: int = 2, length: int = LENGTH) -> Plan:
    """Return a plan for a Llama of `SIZES`, fully trained in fp32 by the HF Trainer."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", **SIZES}
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return brim.plan(
            folder, gpu="1GiB", micro_batch_size=micro, effective_batch_size=micro * accumulation, seq_len=length,
            method="full", trainer="transformers", dtype="fp32", activation_checkpointing="none",
        )  # fmt: skip


def say_of(plan: Plan, peak_bytes: int, budget_bytes: int | None = None) -> Plan:
    """Return a plan whose estimate was made by a trial that said this peak."""
    estimate = replace(plan.estimate, source="trial", peak_allocated_bytes=peak_bytes)
    return replace(plan, estimate=estimate, budget_bytes=budget_bytes or plan.budget_bytes)


def make_batch(rows: int, length: int, real: int | None = None) -> dict[str, Any]:
    """Return a batch whose rows have `real` tokens each."""
    tokens = torch.ones(rows, length, dtype=torch.long)
    mask = (torch.arange(length) < (length if real is None else real)).long().expand(rows, length)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens}

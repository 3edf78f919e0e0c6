"""The traced step against the real one: bytes at every phase, the real side metered by torch.profiler."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch

from brim.spec.recipe import Engine
from real_steps import BATCH, DEPTH, LENGTH, Case, measure_phases, trace_phases

HOLDS = Engine(name="plain", set_to_none=False, logits_alive_in_backward=True, reentrant_checkpointing=True)
CASES = {
    "llama, trainer": lambda: Case("llama"),
    "llama, plain loop, checkpointed": lambda: Case("llama", engine=HOLDS, activation_checkpointing="full"),
    "qwen2, lora, checkpointed": lambda: Case("qwen2", method="lora", activation_checkpointing="full"),
}  # fmt: skip
SLOW = {
    "llama, fused optimizer, two micro-batches": lambda: Case(
        "llama", optimizer_kernel="fused", gradient_accumulation_steps=2
    ),
    "llama, lora, loop over tensors": lambda: Case("llama", method="lora", optimizer_kernel="loop"),
    "gpt2, checkpointed, two micro-batches": lambda: Case(
        "gpt2", activation_checkpointing="full", gradient_accumulation_steps=2
    ),
    **{family: lambda family=family: Case(family) for family in ("phi3", "gemma2", "olmo2", "gpt_neox", "opt")},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_bytes_at_every_phase_are_those_of_a_real_step(name: str) -> None:
    case = (CASES | SLOW)[name]()
    real, traced = measure_phases(case), trace_phases(case)
    assert set(real) == set(traced)
    # Checkpointing saves the generator's state for every layer, on the host, whatever the device.
    checkpointed = case.strategy.activation_checkpointing == "full"
    on_host = DEPTH * torch.get_rng_state().nbytes if checkpointed else 0
    for phase, num_bytes in real.items():
        slack = on_host if phase not in ("before", "optimizer step", "evaluation") else 0
        if phase == "before":  # where labels are counted: the CPU's sum of a mask is made of an int64 copy of it
            slack = 8 * BATCH * LENGTH
        assert num_bytes - slack - 500 <= traced[phase] * 1.001, (phase, num_bytes, traced[phase])
        assert traced[phase] <= num_bytes * 1.001, (phase, num_bytes, traced[phase])

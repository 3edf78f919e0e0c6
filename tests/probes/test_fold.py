"""Five layers unfolded are the whole model, to the byte: every event's size, every moment, what is reserved."""

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
from real_steps import Case

from brim.probes.fold import FOLDED_DEPTH, fold_layers, unfold
from brim.probes.trace import follow_step, trace
from brim.spec.recipe import Engine

CASES = {
    "llama, full": lambda: Case("llama", depth=7),
    "qwen2, lora, autocast, checkpointed": lambda: Case(
        "qwen2", depth=6, method="lora", dtype="bf16", autocast=True, attention="sdpa", optimizer_kernel="fused",
        activation_checkpointing="full",
    ),
}  # fmt: skip
SLOW = {
    "mixtral, loop over tensors": lambda: Case(
        "mixtral", depth=6, dtype="bf16", attention="sdpa", optimizer_kernel="loop"
    ),
    "llama, lora, autocast": lambda: Case(
        "llama", depth=9, method="lora", dtype="bf16", autocast=True, attention="sdpa", optimizer_kernel="fused"
    ),
    "llama, fp32 under autocast, checkpointed": lambda: Case(
        "llama", depth=7, autocast=True, attention="sdpa", activation_checkpointing="full"
    ),
    "gpt2, eager": lambda: Case("gpt2", depth=7),
    "qwen3, two micro-batches": lambda: Case("qwen3", depth=8, dtype="bf16", gradient_accumulation_steps=2),
    "deepseek_v3": lambda: Case("deepseek_v3", depth=7, dtype="bf16", attention="sdpa"),
    "phi3, plain loop": lambda: Case(
        "phi3", depth=7, dtype="bf16", attention="sdpa",
        engine=Engine(name="plain", set_to_none=False, logits_alive_in_backward=True, reentrant_checkpointing=True),
        activation_checkpointing="full",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_unfolded_is_the_whole_model_to_the_byte(name: str) -> None:
    case = (CASES | SLOW)[name]()
    tracker, depth = follow_step(case.workload, case.strategy, case.build, fold=True)
    assert depth == case.workload.model.num_hidden_layers
    assert unfold(tracker.events, tracker.storages, depth) is not None
    folded = trace(case.workload, case.strategy, case.build)
    assert case.config.num_hidden_layers == depth  # the caller's config is left alone
    whole = trace(case.workload, case.strategy, case.build, fold=False)
    assert folded.moments == whole.moments
    assert folded.peak_reserved_bytes == whole.peak_reserved_bytes


def test_events_of_the_unfolded_stream_are_those_of_the_whole() -> None:
    case = Case("llama", depth=7)
    tracker, depth = follow_step(case.workload, case.strategy, case.build, fold=True)
    unfolded = unfold(tracker.events, tracker.storages, depth)
    assert unfolded is not None
    whole, _ = follow_step(case.workload, case.strategy, case.build)
    assert sorted(event[1:3] for event in unfolded[0]) == sorted(event[1:3] for event in whole.events)
    assert sum(event.num_bytes for event in unfolded[0]) == sum(event.num_bytes for event in whole.events)


def test_layers_that_differ_are_not_folded() -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(7)] + [torch.nn.Linear(4, 8)])
    assert fold_layers(torch.nn.ModuleDict({"layers": layers})) == 0
    assert len(layers) == 8
    alike = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(7))
    assert fold_layers(torch.nn.ModuleDict({"layers": alike})) == 7
    assert len(alike) == FOLDED_DEPTH


def test_a_stream_whose_middle_layers_differ_is_not_unfolded() -> None:
    case = Case("llama", depth=7)
    tracker, depth = follow_step(case.workload, case.strategy, case.build, fold=True)
    at = next(index for index, event in enumerate(tracker.events) if event.layer == 3 and event.num_bytes > 0)
    tracker.events[at] = replace_bytes(tracker.events[at])
    assert unfold(tracker.events, tracker.storages, depth) is None


def replace_bytes(event):  # type: ignore[no-untyped-def]
    return event._replace(num_bytes=event.num_bytes + 512)


def test_depth_costs_no_time_in_proportion() -> None:
    """Eighty layers are five traced and seventy-five repeated."""
    case = Case("llama", depth=80, dtype="bf16", attention="sdpa", activation_checkpointing="full")
    tracker, depth = follow_step(case.workload, case.strategy, case.build, fold=True)
    stream = unfold(tracker.events, tracker.storages, depth)
    assert stream is not None and len(stream[0]) > 8 * len(tracker.events)

"""Four repeats unfolded are the whole model, to the byte: every event's size, every moment, what is reserved."""

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

from brim.probes.fold import Pattern, find_pattern, fold_layers, unfold
from brim.probes.follow import follow_step
from brim.probes.pieces import write_out
from brim.probes.trace import trace
from brim.spec.recipe import Engine, Quantization
from real_steps import Case

CASES = {
    "llama, full": lambda: Case("llama", depth=7),
    "qwen2, lora, autocast, checkpointed": lambda: Case(
        "qwen2", depth=6, method="lora", dtype="bf16", autocast=True, attention="sdpa", optimizer_kernel="fused",
        activation_checkpointing="full",
    ),
}  # fmt: skip
SLOW = {
    "int8, whose inputs hang on the graph": lambda: Case(
        "llama", depth=9, method="lora", dtype="bf16", autocast=True, attention="sdpa",
        quantization=Quantization(kind="int8"),
    ),
    "gemma2, window in every other layer": lambda: Case("gemma2", depth=14, dtype="bf16"),
    "gemma3, five windows and a whole": lambda: Case(
        "gemma3_text", depth=38, method="lora", dtype="bf16", attention="sdpa", activation_checkpointing="full"
    ),
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
    tracker, pattern = follow_step(case.workload, case.strategy, case.build, fold=True)
    assert pattern is not None and pattern.num_layers == case.workload.model.num_hidden_layers > pattern.kept
    assert unfold(tracker.events, tracker.storages, pattern) is not None
    folded = trace(case.workload, case.strategy, case.build)
    assert case.config.num_hidden_layers == pattern.num_layers  # the caller's config is left alone
    whole = trace(case.workload, case.strategy, case.build, fold=False)
    assert folded.moments == whole.moments
    assert folded.peak_reserved_bytes == whole.peak_reserved_bytes
    assert [one.bytes for one in folded.tensors] == [one.bytes for one in whole.tensors]


@pytest.mark.parametrize("family", ["bart", "t5_gated"])
def test_a_decoder_is_folded_beside_an_encoder_that_is_heavier_than_what_is_left(family: str) -> None:
    case = Case(family, depth=8, method="lora", dtype="bf16", attention="sdpa")
    folded = trace(case.workload, case.strategy, case.build)
    whole = trace(case.workload, case.strategy, case.build, fold=False)
    assert folded.moments == whole.moments


def test_events_of_the_unfolded_stream_are_those_of_the_whole() -> None:
    case = Case("llama", depth=7)
    tracker, pattern = follow_step(case.workload, case.strategy, case.build, fold=True)
    assert pattern is not None
    unfolded = unfold(tracker.events, tracker.storages, pattern)
    assert unfolded is not None
    whole, _ = follow_step(case.workload, case.strategy, case.build)
    events = list(write_out(unfolded[0]))
    assert [event[1:] for event in events] == [event[1:] for event in _in_order_of_layers(whole)]
    assert all(unfolded[1][event.key].num_bytes <= event.num_bytes for event in events if event.num_bytes > 0)


def _in_order_of_layers(tracker):  # type: ignore[no-untyped-def]
    from brim.probes.fold import _order_frees

    return _order_frees(tracker.events, {key: storage.layer for key, storage in tracker.storages.items()})


@pytest.mark.parametrize(("kinds", "pattern"), [
    ("aaaaaaa", (0, 1, 7)), ("aaaa", None), ("abcdefg", None), ("daaaaaa", (1, 1, 6)), ("aaaaaaz", (0, 1, 6)),
    ("sf" * 6, (0, 2, 6)), ("sssssf" * 8 + "ss", (0, 6, 8)), ("ddd" + "e" * 58, (3, 1, 58)), ("sfsfsf", None),
])  # fmt: skip
def test_the_pattern_leaves_the_fewest_layers(kinds: str, pattern: tuple[int, int, int] | None) -> None:
    found = find_pattern(list(kinds))
    assert (found and (found.before, found.length, found.repeats)) == pattern
    if found is not None:
        assert found.kept + found.missing * found.length == len(kinds) == found.num_layers


def test_units_are_layers_but_each_repeat_is_one() -> None:
    pattern = Pattern(before=1, length=2, repeats=6, num_layers=14)
    assert pattern.kept == 10
    assert [pattern.unit_of(layer) for layer in range(10)] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert pattern.middle == 2


def test_layers_that_differ_are_not_folded() -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(4)] + [torch.nn.Linear(4, 8)])
    assert fold_layers(torch.nn.ModuleDict({"layers": layers})) is None
    assert len(layers) == 5
    alike = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(7))
    assert fold_layers(torch.nn.ModuleDict({"layers": alike})) == Pattern(0, 1, 7, 7)
    assert len(alike) == 4


def test_a_stream_whose_inner_repeats_differ_is_not_unfolded() -> None:
    case = Case("llama", depth=7)
    tracker, pattern = follow_step(case.workload, case.strategy, case.build, fold=True)
    assert pattern is not None
    at = next(index for index, event in enumerate(tracker.events) if event.layer == 2 and event.num_bytes > 0)
    tracker.events[at] = tracker.events[at]._replace(num_bytes=tracker.events[at].num_bytes + 512)
    assert unfold(tracker.events, tracker.storages, pattern) is None


def test_depth_costs_no_time_in_proportion() -> None:
    """Eighty layers are four traced and seventy-six repeated."""
    case = Case("llama", depth=80, dtype="bf16", attention="sdpa", activation_checkpointing="full")
    tracker, pattern = follow_step(case.workload, case.strategy, case.build, fold=True)
    assert pattern is not None
    stream = unfold(tracker.events, tracker.storages, pattern)
    assert stream is not None and len(list(write_out(stream[0]))) > 8 * len(tracker.events)

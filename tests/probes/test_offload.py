"""Activations on the host: which tensors go, against TRL's own code; what stays on the device, by arithmetic."""

from __future__ import annotations

import contextlib
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch

from brim.cost.ledger import Ledger
from brim.probes.offload import OnHost, SavedTensors, describe
from brim.probes.trace import trace
from brim.spec.recipe import Engine
from real_steps import LENGTH, Case

WIDTH, MICRO_BATCH = 256, 34
LAYER_INPUT = MICRO_BATCH * LENGTH * WIDTH * 2


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def ledgers(engine: str, depth: int = 8, **knobs: Any) -> dict[str, Ledger]:
    """Return the moments of a bf16 step whose layer inputs are larger than 2 MiB."""
    case = Case(
        "llama", engine=Engine(name=engine), dtype="bf16", attention="sdpa", depth=depth,
        micro_batch_size=MICRO_BATCH, **{"activation_checkpointing": "full", "activation_offload": True, **knobs},
    )  # fmt: skip
    return {one.name: one.ledger for one in trace(case.workload, case.strategy, case.build).moments}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "trl", "unsloth"])
def test_layer_inputs_wait_on_the_host(engine: str) -> None:
    """The deeper the model, the more layer inputs; offloaded, none of them is on the device."""
    deep, shallow = ledgers(engine), ledgers(engine, depth=6)
    grown = deep["loss"].activations - shallow["loss"].activations
    assert abs(grown) < LAYER_INPUT / 4
    kept = ledgers(engine, activation_offload=False)["loss"].activations
    assert kept - ledgers(engine, activation_offload=False, depth=6)["loss"].activations > 1.9 * LAYER_INPUT


def test_unsloth_keeps_two_buffers_and_the_last_input() -> None:
    """Compared with TRL's, which keeps neither once the forward pass is over."""
    unsloth, trl = ledgers("unsloth"), ledgers("transformers")
    more = unsloth["loss"].total_bytes - trl["loss"].total_bytes
    assert more == pytest.approx(3 * LAYER_INPUT, rel=0.05)
    assert unsloth["optimizer step"].total_bytes - trl["optimizer step"].total_bytes == pytest.approx(
        2 * LAYER_INPUT, rel=0.05
    )


def test_the_last_five_stay_while_they_are_copied() -> None:
    """One of them is the running layer's own, which is there anyway."""
    moving, moved = ledgers("trl"), ledgers("transformers")
    more = moving["forward of layers"].total_bytes - moved["forward of layers"].total_bytes
    assert more == pytest.approx(4 * LAYER_INPUT, rel=0.01)


def test_small_inputs_stay_on_the_device() -> None:
    """Unsloth moves from 2 MiB on."""
    case = Case("llama", engine=Engine(name="unsloth"), dtype="bf16", attention="sdpa", activation_checkpointing="full")
    offloaded = replace(case.strategy, activation_offload=True)
    assert trace(case.workload, offloaded, case.build).peak_allocated_bytes == pytest.approx(
        trace(case.workload, case.strategy, case.build).peak_allocated_bytes, rel=0.01
    )


def test_the_same_tensors_go_as_with_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's class with streams that do nothing, on real tensors, beside brim's on the same model."""
    offloading = pytest.importorskip("trl.models.activation_offloading")
    model = Case("llama").build()
    inputs = torch.zeros(2, LENGTH, dtype=torch.long)
    theirs = make_theirs(offloading, monkeypatch, model)
    with theirs:
        outputs = model(input_ids=inputs, labels=inputs)
        moved = [entry[1] for _, entry in sorted(theirs.tracker.items())]
        del outputs
    ours = SavedTensors(model)
    with ours():
        outputs = model(input_ids=inputs, labels=inputs)
        saved = [isinstance(one, OnHost) for _, one in sorted(ours._saved.items())]
        del outputs
    assert len(saved) > 50 and any(saved) and not all(saved)
    assert saved == moved


def make_theirs(offloading: Any, monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module) -> Any:
    stream = SimpleNamespace(
        wait_stream=lambda _: None, wait_event=lambda _: None, record_event=lambda: None, synchronize=lambda: None
    )
    module = SimpleNamespace(
        Stream=lambda: stream, current_stream=lambda: stream, stream=lambda _: contextlib.nullcontext(),
        empty_cache=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    theirs = offloading.OffloadActivations(use_pin_memory=False)
    theirs.update_model_params(model)
    return theirs


def test_gradients_come_out_where_tensors_are_brought_back() -> None:
    """Shapes and layouts survive, views and broadcasts too."""
    whole = torch.randn(8, 64, 32)
    for tensor in (whole, whole.transpose(1, 2).contiguous(), whole[:, :1].expand(8, 64, 32)):
        back = describe(tensor).bring_back(torch.device("cpu"))
        assert (back.shape, back.stride()) == (tensor.shape, tensor.stride())

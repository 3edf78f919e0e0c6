"""Experts: who gets which token, and experts taken apart do what fused ones do, byte for byte as a real loop."""

from __future__ import annotations

import contextlib
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from brim.cost.estimate import estimate
from brim.probes.experts import balance_experts, separate_experts, spread_evenly, spread_unevenly
from brim.probes.model import give_tensors
from brim.probes.trace import trace
from brim.probes.tracker import StorageTracker
from brim.probes.values import KnownValues
from brim.spec.recipe import Engine
from real_steps import Case
from tiny_models import tiny_class, tiny_config

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def test_tokens_are_spread_evenly() -> None:
    chosen = spread_evenly((96, 2), 8)
    assert torch.bincount(chosen.flatten()).tolist() == [24] * 8
    assert all(len(set(row)) == 2 for row in chosen.tolist())


@pytest.mark.parametrize("imbalance", [1.5, 2.0, 3.0, 100.0])
def test_the_busiest_expert_gets_its_share_and_no_token_twice(imbalance: float) -> None:
    chosen = spread_unevenly((96, 2), 8, imbalance)
    counts = torch.bincount(chosen.flatten(), minlength=8).tolist()
    assert counts[0] == min(96, round(imbalance * 24))
    assert sum(counts) == 192 and max(counts[1:]) - min(counts[1:]) <= 1
    assert all(len(set(row)) == 2 for row in chosen.tolist())


def test_only_routers_are_uneven() -> None:
    model = torch.nn.Module()
    model.config = tiny_config("mixtral", 1)
    choose = balance_experts(model, 2.0)
    assert (choose((96, 2), 8) == 0).sum() == 48
    assert torch.equal(choose((96, 2), 9), spread_evenly((96, 2), 9))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_taken_apart_compute_what_fused_ones_do(family: str) -> None:
    config = tiny_config(family, 1, attention="eager")
    torch.manual_seed(0)
    fused = tiny_class(config)(config).eval()
    apart = tiny_class(config)(config).eval()
    assert separate_experts(apart) == 1
    apart.to_empty(device="cpu")
    apart.load_state_dict(_separate(fused.state_dict(), apart.state_dict()))
    for (_, mine), (_, its) in zip(apart.named_buffers(), fused.named_buffers(), strict=True):
        mine.data.copy_(its)
    ids = torch.randint(3, 500, (2, 16))
    with torch.no_grad():
        assert torch.allclose(apart(input_ids=ids).logits, fused(input_ids=ids).logits, atol=1e-5)


def _separate(fused: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the fused model under the names of the other."""
    found = {}
    for name in wanted:
        if name in fused:
            found[name] = fused[name]
            continue
        prefix, _, rest = name.partition("experts.")
        number, matrix, _ = rest.split(".")
        gate, up = fused[f"{prefix}experts.gate_up_proj"][int(number)].chunk(2)
        down = fused[f"{prefix}experts.down_proj"][int(number)]
        found[name] = {"w1": gate, "w3": up, "w2": down, "gate_proj": gate, "up_proj": up, "down_proj": down}[matrix]
    return found


def _list_peaks(imbalance: float, fake: bool) -> tuple[int, list[int]]:
    """Highest bytes of forward and backward of a block of experts, and bytes of every allocation."""
    config = tiny_config("mixtral", 1)
    block = tiny_class(config)(config).model.layers[0].mlp
    holder = torch.nn.Module()
    holder.config, holder.block = config, block
    separate_experts(holder)
    tracker = StorageTracker(kind=FakeTensor if fake else torch.Tensor, block_bytes=1)
    known = KnownValues(balance_experts(holder, imbalance))
    tracker.read_scalar = known.read_scalar
    chosen = spread_unevenly((96, 2), 8, imbalance).tolist()
    with contextlib.ExitStack() as modes:
        if fake:
            modes.enter_context(FakeTensorMode())
            modes.enter_context(known)
        give_tensors(holder)
        _run(block.experts, torch.tensor(chosen), tracker)
    live = highest = 0
    for event in tracker.events:
        live += event.num_bytes
        highest = max(highest, live)
    return highest, [event.num_bytes for event in tracker.events if event.num_bytes > 4096]


def _run(experts: torch.nn.Module, chosen: torch.Tensor, tracker: StorageTracker) -> None:
    hidden = torch.ones(96, 256, requires_grad=True)
    weights = torch.ones(96, 2, requires_grad=True)
    with tracker:
        torch.autograd.backward(experts(hidden, chosen, weights).sum())


@pytest.mark.parametrize("imbalance", [1.5, 3.0])
def test_the_loop_on_fake_tensors_allocates_what_a_real_one_does(imbalance: float) -> None:
    real, fake = _list_peaks(imbalance, fake=False), _list_peaks(imbalance, fake=True)
    assert fake[1] == real[1]
    assert fake[0] == pytest.approx(real[0], rel=0.001)


def test_a_busy_expert_costs_temporaries_in_a_loop() -> None:
    assert _list_peaks(3.0, fake=True)[0] > _list_peaks(1.01, fake=True)[0]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen2_moe", marks=pytest.mark.slow)])
def test_the_formula_agrees_in_both_forms(family: str, fused: bool) -> None:
    case = Case(family, dtype="bf16", attention="sdpa", engine=Engine(name="transformers", fused_experts=fused))
    traced = {one.name: one.ledger for one in trace(case.workload, case.strategy, case.build).moments}
    told = {one.name: one.ledger for one in estimate(case.workload, case.strategy).moments}
    for name in ("loss", "optimizer step"):
        assert traced[name].total_bytes == pytest.approx(told[name].total_bytes, rel=0.02)
        assert traced[name].activations == pytest.approx(told[name].activations, rel=0.03, abs=1 << 20)


def test_adapters_find_separate_experts_by_name() -> None:
    case = Case("mixtral", method="lora", dtype="bf16", attention="sdpa")
    engine = Engine(name="transformers", fused_experts=False)
    lora = replace(case.workload.recipe.lora, target_modules=("w1", "w2", "w3"))
    workload = replace(case.workload, recipe=replace(case.workload.recipe, engine=engine, lora=lora))
    traced, told = trace(workload, case.strategy, case.build), estimate(workload, case.strategy)
    assert traced.moments[-1].ledger.parameters == pytest.approx(told.moments[-1].ledger.parameters, rel=0.002)


@pytest.mark.parametrize("fused", [True, False])
def test_adapters_on_attention_agree_with_the_formula_in_both_forms(fused: bool) -> None:
    case = Case("mixtral", method="lora", dtype="bf16", attention="sdpa")
    lora = replace(case.workload.recipe.lora, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    engine = Engine(name="transformers", fused_experts=fused)
    workload = replace(case.workload, recipe=replace(case.workload.recipe, engine=engine, lora=lora))
    traced, told = trace(workload, case.strategy, case.build), estimate(workload, case.strategy)
    assert traced.peak_allocated_bytes == pytest.approx(told.peak_allocated_bytes, rel=0.02)

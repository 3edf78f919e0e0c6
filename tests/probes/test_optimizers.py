"""Optimizers on tensors without data against the real ones: states, what a step holds, what a checkpoint makes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from brim.cost.states import count_states, step_temporaries_bytes
from brim.errors import ProbeFailed
from brim.probes.composed_optimizers import MasterWeights
from brim.probes.model import give_tensors, prepare_model
from brim.probes.optimizers import (
    group_parameters,
    host_states,
    load_states,
    make_optimizer,
    paged_states,
    start_states,
)
from brim.probes.trace import trace
from brim.probes.tracker import StorageTracker
from brim.spec.recipe import Engine, Recipe
from brim.spec.strategy import Strategy
from brim.tables.read import list_optimizers
from real_steps import Case, measure_phases, trace_phases

TRAINER, OWN = Engine(name="transformers"), Engine(name="plain")
KERNELS = [(row.name, kernel) for row in list_optimizers() for kernel in row.kernels]
BITSANDBYTES = ("adamw-8bit", "paged-adamw-8bit", "paged-adamw-32bit", "lion", "lion-8bit")
TORCH = [pair for pair in KERNELS if pair[0] not in BITSANDBYTES]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    warnings.simplefilter("ignore")
    # oneDNN's kernels copy 16-bit operands, which no GPU kernel does.
    with torch.backends.mkldnn.flags(enabled=False):
        yield


class Small(torch.nn.Module):
    """A lookup table, matrices that are quantised, paged or neither, and vectors."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(400, 64, dtype=dtype)
        self.wide = torch.nn.Linear(400, 300, dtype=dtype)
        self.narrow = torch.nn.Linear(64, 32, bias=False, dtype=dtype)
        self.odd = torch.nn.Linear(65, 67, bias=False, dtype=dtype)
        self.norm = torch.nn.LayerNorm(300, dtype=dtype)


def recipe(optimizer: str = "adamw", **chosen: Any) -> Recipe:
    return Recipe(**({"method": "full", "optimizer": optimizer, "engine": TRAINER} | chosen))


def strategy(kernel: str) -> Strategy:
    return Strategy(micro_batch_size=1, gradient_accumulation_steps=1, optimizer_kernel=kernel)  # type: ignore[arg-type]


def make(optimizer: str, kernel: str, dtype: torch.dtype, **chosen: Any) -> tuple[Small, torch.optim.Optimizer]:
    model = Small(dtype)
    return model, make_optimizer(model, recipe(optimizer, **chosen), strategy(kernel))


def give_gradients(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.1, dtype=parameter.grad_dtype)


def describe(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Shapes and dtypes of the states of every parameter."""
    return [
        {key: (tuple(one.shape), one.dtype) for key, one in optimizer.state[parameter].items()
         if isinstance(one, torch.Tensor)}
        for group in optimizer.param_groups for parameter in group["params"]
    ]  # fmt: skip


def measure_updates(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    """Return the most bytes above those of the weights in each of two real updates, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        for _ in range(2):
            give_gradients(model)
            with torch.profiler.record_function("update"):
                optimizer.step()
            with torch.profiler.record_function("end"):
                pass
    highest: list[int] = []
    live, inside = 0, False
    for event in sorted(session.profiler.kineto_results.events(), key=lambda one: one.start_ns()):  # type: ignore
        inside = event.name() == "update" or (inside and event.name() != "end")
        live += event.nbytes() if event.name() == "[memory]" else 0
        if event.name() == "update":
            highest.append(live)
        if inside:
            highest[-1] = max(highest[-1], live)
    return highest


def trace_updates(optimizer: str, kernel: str, dtype: torch.dtype, **chosen: Any) -> list[int]:
    """Return the same of updates on tensors without data."""
    tracker = StorageTracker(scalar=1.0, kind=FakeTensor, block_bytes=1)
    with FakeTensorMode():
        model, made = make(optimizer, kernel, dtype, **chosen)
        tracker.follow(model.parameters(), "parameter")
        weights = _highest(tracker)
        with tracker:
            for step in range(2):
                tracker.begin("between")
                give_gradients(model)
                tracker.begin(f"update {step}")
                made.step()
    live, highest = -weights, {"update 0": 0, "update 1": 0}
    for event in tracker.events:
        live += event.num_bytes
        if event.phase in highest:
            highest[event.phase] = max(highest[event.phase], live)
    return list(highest.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("optimizer", "kernel"), TORCH)
@pytest.mark.parametrize("masters", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "masters"])
def test_an_update_holds_what_the_real_one_holds(
    optimizer: str, kernel: str, dtype: torch.dtype, masters: bool
) -> None:
    """To the byte, but for counts of steps, which the CPU's kernels make anew."""
    real = measure_updates(*make(optimizer, kernel, dtype, master_weights=masters))
    traced = trace_updates(optimizer, kernel, dtype, master_weights=masters)
    assert traced == pytest.approx(real, abs=200)
    assert max(real) > 100_000


@pytest.mark.parametrize(("optimizer", "kernel"), TORCH)
@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
def test_a_checkpoint_makes_the_states_it_makes_of_the_real_one(optimizer: str, kernel: str, masters: bool) -> None:
    """A real optimizer takes a step, is saved, and loaded into a new one; dtypes are those of loading."""
    model, first = make(optimizer, kernel, torch.bfloat16, master_weights=masters)
    give_gradients(model)
    first.step()
    _, second = make(optimizer, kernel, torch.bfloat16, master_weights=masters)
    for old, new in zip(_parts(first), _parts(second), strict=True):
        new.load_state_dict(old.state_dict())
    loaded = describe(second)
    _, third = make(optimizer, kernel, torch.bfloat16, master_weights=masters)
    start_states(third, resumes=True)
    assert describe(third) == loaded
    assert sum(map(len, loaded)) > 0 or optimizer == "sgd"


def _parts(optimizer: Any) -> list[Any]:
    inner = optimizer.start() if isinstance(optimizer, MasterWeights) else optimizer
    return list(getattr(inner, "parts", [inner]))


@pytest.mark.parametrize("optimizer", BITSANDBYTES)
@pytest.mark.parametrize("engine", [TRAINER, OWN], ids=["trainer", "own loop"])
def test_states_are_those_of_bitsandbytes(optimizer: str, engine: Engine) -> None:
    """bitsandbytes takes real steps on the CPU, where nothing is paged; the Trainer keeps lookup tables in fp32."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, made = make(optimizer, "fused", torch.bfloat16, engine=engine)
    kind = bitsandbytes.optim.Lion if "lion" in optimizer else bitsandbytes.optim.AdamW
    bits = 8 if "8bit" in optimizer else 32
    real = kind([{"params": group["params"]} for group in made.param_groups], optim_bits=bits)
    if engine is TRAINER and bits == 8:  # as trainer.py create_optimizer does
        real.mng.register_module_override(model.table, "weight", {"optim_bits": 32})
    for one in (made, real):
        give_gradients(model)
        one.step()
    shared = {f"qmap{index}" for index in (1, 2)}
    wanted = [{key: one for key, one in state.items() if key not in shared} for state in describe(real)]
    assert describe(made) == wanted
    maps = {id(state[key]) for state in real.state.values() for key in shared & state.keys()}
    assert len(maps) == len(made.maps)  # type: ignore[attr-defined]
    resumed = kind([{"params": group["params"]} for group in made.param_groups], optim_bits=bits)
    resumed.load_state_dict(real.state_dict())
    load_states(made)
    assert describe(made) == describe(resumed)
    real.mng.initialize()


def test_large_states_are_paged_until_a_checkpoint_is_loaded() -> None:
    """Of 120,000 elements on; what load_state_dict moves to the card is in the allocator."""
    model, made = make("paged-adamw-8bit", "fused", torch.bfloat16)
    give_gradients(model)
    made.step()
    assert [tuple(one.shape) for one in paged_states(made)] == [(300, 400)] * 2
    assert {id(one) for one in host_states(made)} == {id(one) for one in paged_states(made)}
    _, resumed = make("paged-adamw-8bit", "fused", torch.bfloat16)
    load_states(resumed)
    give_gradients(model)
    resumed.step()
    assert host_states(resumed) == []


@pytest.mark.parametrize(("kernel", "count"), [("loop", 7), ("foreach", 7), ("fused", 0)])
def test_counts_of_steps_are_on_the_host_unless_fused(kernel: str, count: int) -> None:
    for masters in (False, True):
        model, made = make("adamw", kernel, torch.float32, master_weights=masters)
        give_gradients(model)
        made.step()
        assert len(host_states(made)) == count
    assert host_states(make("sgd", kernel, torch.float32)[1]) == []


def test_groups_are_those_of_the_trainer() -> None:
    from transformers import Trainer

    model = Case("llama").build()
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    names = {id(one): name for name, one in model.named_parameters()}
    groups = [{names[id(one)] for one in group["params"]} for group in group_parameters(model, recipe())]
    assert groups == [decayed, set(names.values()) - decayed]
    assert len(group_parameters(model, recipe(engine=OWN))) == 1


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("optimizer", "kernel"), KERNELS)
@pytest.mark.parametrize("masters", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "masters"])
def test_the_formula_counts_the_same(optimizer: str, kernel: str, method: str, masters: bool) -> None:
    """States but for scalars and tables of 256 values; temporaries but for what is left of the tensor before."""
    case = Case("llama", method=method, dtype="bf16", optimizer_kernel=kernel)
    one = replace(case.workload.recipe, optimizer=optimizer, master_weights=masters)
    tracker = StorageTracker(scalar=1.0, kind=FakeTensor, block_bytes=1)
    model = prepare_model(case.build, one, case.strategy)
    with FakeTensorMode():
        give_tensors(model)
        made = make_optimizer(model, one, case.strategy)
        start_states(made, resumes=False)
        give_gradients(model)
        made.step()
        kept = [value for state in made.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        give_gradients(model)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        tracker.follow((*model.parameters(), *kept, *gradients), "parameter")
        resident, given = _highest(tracker), sum(gradient.nbytes for gradient in gradients)
        largest = 4 * max(gradient.numel() for gradient in gradients)
        del gradients  # nobody else holds them in a run
        with tracker:
            made.step()
    states = count_states(case.workload.model, one)
    paged, scalars = sum(value.nbytes for value in paged_states(made)), 8 * len(made.state)
    assert sum(value.nbytes for value in kept) - paged == pytest.approx(states.optimizer_bytes, abs=scalars + 2048)
    assert paged == states.paged_bytes
    assert given == states.gradients_bytes
    told = step_temporaries_bytes(case.workload.model, one, kernel)  # type: ignore[arg-type]
    # A loop drops what it made for a tensor when it has made the like for the next; so does widening gradients.
    slack = 2 * largest if kernel == "loop" else largest if masters else 0
    assert _highest(tracker) - resident == pytest.approx(told, rel=0.01, abs=slack + scalars)


def _highest(tracker: StorageTracker) -> int:
    live = highest = 0
    for event in tracker.events:
        live += event.num_bytes
        highest = max(highest, live)
    return highest


@pytest.mark.parametrize(
    ("optimizer", "masters"),
    [("adafactor", False), ("paged-adamw-8bit", True),
     *(pytest.param(row.name, masters, marks=pytest.mark.slow) for row in list_optimizers()
       for masters in (False, True))],
)  # fmt: skip
def test_layers_left_out_are_repeated(optimizer: str, masters: bool) -> None:
    """Four of six layers and a repeated stream, to the byte of all six: paged states too."""
    case = Case("llama", dtype="bf16", attention="sdpa", optimizer_kernel="loop", depth=6)
    workload = replace(
        case.workload, recipe=replace(case.workload.recipe, optimizer=optimizer, master_weights=masters)
    )
    folded, whole = (trace(workload, case.strategy, case.build, fold=fold) for fold in (True, False))
    assert any("4 of 6 layers" in note for note in folded.notes)
    assert folded.moments == whole.moments
    assert folded.device_bytes == whole.device_bytes


def test_paged_states_are_on_the_device_outside_the_allocator() -> None:
    case = Case("llama", dtype="bf16", attention="sdpa", optimizer_kernel="fused")
    plain, paged = (
        trace(replace(case.workload, recipe=replace(case.workload.recipe, optimizer=name)), case.strategy, case.build)
        for name in ("adamw-8bit", "paged-adamw-8bit")
    )
    one = replace(case.workload.recipe, optimizer="paged-adamw-8bit")
    expected = count_states(case.workload.model, one).paged_bytes
    outside = [found.device_bytes - found.peak_reserved_bytes for found in (plain, paged)]
    assert outside[1] - outside[0] == expected > 0
    assert paged.peak_allocated_bytes < plain.peak_allocated_bytes


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_arrive_in_the_dtype_asked_for(dtype: str) -> None:
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    with FakeTensorMode():
        model, made = make("adamw", "foreach", torch.bfloat16, gradient_dtype=dtype, master_weights=True)
        torch.autograd.backward((model.wide.weight * 2).sum())
        assert model.wide.weight.grad is not None and model.wide.weight.grad.dtype == wanted
        made.step()
        assert model.wide.weight.grad is None
        assert {one.dtype for one in made.state[model.wide.weight].values()} == {torch.float32}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "muon"])
def test_gradients_no_optimizer_takes_are_refused(optimizer: str) -> None:
    with pytest.raises(ProbeFailed, match=f"gradients in fp32: {optimizer} takes them in the weights' dtype; set mas"):
        make(optimizer, "fused", torch.bfloat16, gradient_dtype="fp32")


def test_a_model_without_trained_parameters_is_refused() -> None:
    with pytest.raises(ProbeFailed, match="no parameter of the model trains"):
        make_optimizer(Small().requires_grad_(False), recipe(), strategy("fused"))


@pytest.mark.slow
def test_all_phases_of_a_resumed_run_with_master_weights() -> None:
    """Loaded states are there from the start: every phase is a steady one."""
    case = Case("llama", method="lora", engine=Engine(name="transformers", resumes=True))
    one = replace(case.workload.recipe, master_weights=True)
    case.workload = replace(case.workload, recipe=one)
    real, traced = measure_phases(case), trace_phases(case)
    assert "first step" not in real
    assert traced == pytest.approx(real, rel=0.001, abs=3000)  # counts of steps, on the host

"""Adapters fused with their matrices: PEFT's values and gradients, less kept, and only where the package fuses."""

from __future__ import annotations

import sys
import warnings
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

from brim.probes.adapter_kernels import FOAK, UNSLOTH, Style
from brim.probes.fused_adapters import _share, fuse_adapters
from brim.probes.model import prepare_model
from brim.probes.trace import trace
from brim.probes.tracker import StorageTracker
from brim.spec.recipe import Quantization
from brim.spec.strategy import Strategy
from real_steps import Case

NAMES = ("q_proj", "k_proj", "v_proj")
EVERYTHING = (*NAMES, "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def adapted(dropout: float = 0.0) -> Any:
    """Return three projections of one input as PEFT adapts them, with values of their own."""
    import peft

    torch.manual_seed(0)
    module = torch.nn.Module()
    for name, width in zip(NAMES, (64, 32, 32), strict=True):
        module.add_module(name, torch.nn.Linear(64, width, bias=False))
    config = peft.LoraConfig(
        r=4, lora_alpha=12, lora_dropout=dropout, target_modules=list(NAMES), init_lora_weights=False
    )  # fmt: skip
    model = peft.get_peft_model(module, config)  # type: ignore[arg-type]
    return model.base_model.model.train()


def run(module: Any, x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return outputs, and gradients of the input and of every adapter weight."""
    x = (x.clone().requires_grad_() * 1).contiguous()  # the input of a projection is some layer's output
    x.retain_grad()
    outputs = [module._modules[name](x) for name in NAMES]
    torch.autograd.backward(sum((index + 1) * one.square().sum() for index, one in enumerate(outputs)))
    return outputs, [x.grad, *(one.grad for one in module.parameters() if one.requires_grad)]  # type: ignore[list-item]


@pytest.mark.parametrize("style", [UNSLOTH, FOAK])
def test_values_and_gradients_are_those_of_peft(style: Style) -> None:
    x = torch.randn(2, 8, 64)
    theirs = run(adapted(), x)
    module = adapted()
    _share(module, NAMES, style, None)
    ours = run(module, x)
    for own, real in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert own.dtype == real.dtype
        assert torch.allclose(own, real, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("style", "kept_per_projection"), [(UNSLOTH, 1), (FOAK, 4)])
def test_dropout_leaves_a_mask_or_a_copy(style: Style, kept_per_projection: int) -> None:
    """Unsloth keeps a boolean mask a projection, fms-acceleration the dropped-out input, fp32 here."""
    module = adapted(dropout=0.1)
    _share(module, NAMES, style, None)
    x = torch.zeros(2, 8, 64).requires_grad_() * 1
    tracker = StorageTracker(block_bytes=1)
    tracker.follow((("x", x), *module.named_parameters()), "input")
    tracker.events.clear()
    with tracker:
        outputs = [module._modules[name](x) for name in NAMES]
    live = sum(event.num_bytes for event in tracker.events)
    assert live == sum(one.nbytes for one in outputs) + 3 * kept_per_projection * x.numel()
    torch.autograd.backward(outputs[0].sum())


def lora_case(quantised: bool, targets: tuple[str, ...], kernels: str) -> Case:
    case = Case("llama", dtype="bf16", method="lora", attention="sdpa", layer_kernels=kernels)
    recipe = case.workload.recipe
    lora = replace(recipe.lora, target_modules=targets)  # type: ignore[type-var]
    recipe = replace(recipe, lora=lora, autocast=True)
    if quantised:
        recipe = replace(recipe, method="qlora", quantization=Quantization(kind="nf4", double_quant=True))
    case.workload = replace(case.workload, recipe=recipe)
    return case


def list_fused(case: Case) -> set[str]:
    model = prepare_model(case.build, case.workload.recipe, case.strategy)
    names = [name for name, module in model.named_modules() if "forward" in vars(module)]
    return {name.rpartition(".")[2] for name in names} & {*EVERYTHING, "mlp"}


@pytest.mark.parametrize(("quantised", "targets", "kernels", "fused"), [
    (False, EVERYTHING, "unsloth", {*NAMES, "o_proj", "mlp"}),
    (True, EVERYTHING, "foak", {*NAMES, "o_proj", "mlp"}),
    (False, EVERYTHING, "foak", set()),
    (False, ("q_proj", "v_proj", "o_proj"), "unsloth", {"o_proj"}),
    (False, EVERYTHING, "liger", {"mlp"}),
])  # fmt: skip
def test_only_whole_groups_are_fused(
    quantised: bool, targets: tuple[str, ...], kernels: str, fused: set[str]
) -> None:
    assert list_fused(lora_case(quantised, targets, kernels)) == fused


@pytest.mark.parametrize(("quantised", "kernels"), [(True, "unsloth"), (False, "unsloth"), (True, "foak")])
def test_a_step_takes_less_with_fused_adapters(quantised: bool, kernels: str) -> None:
    case = lora_case(quantised, EVERYTHING, kernels)
    plain = lora_case(quantised, EVERYTHING, "none")
    peaks = [trace(one.workload, one.strategy, one.build) for one in (case, plain)]
    backward = [next(moment for moment in one.moments if moment.name == "backward of layers") for one in peaks]
    assert backward[0].ledger.activations < 0.75 * backward[1].ledger.activations


def test_full_training_has_nothing_to_fuse() -> None:
    case = Case("llama", layer_kernels="unsloth")
    model = case.build()
    before = [name for name, module in model.named_modules() if "forward" in vars(module)]
    fuse_adapters(
        model, case.workload.recipe,
        Strategy(micro_batch_size=1, gradient_accumulation_steps=1, layer_kernels="unsloth"),
    )  # fmt: skip
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == before

"""What is kept under each kind of checkpointing: against real steps, against the formula, and PyTorch's own promise."""

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
from torch.utils.checkpoint import checkpoint as checkpoint_function

from brim.cost.estimate import estimate
from brim.errors import ProbeFailed
from brim.probes.checkpointing import checkpoint
from brim.probes.kernels import CudaAutocast
from brim.probes.trace import trace
from brim.spec.recipe import Engine
from real_steps import BATCH, DEPTH, LENGTH, Case, measure_phases, trace_phases

WIDTH, HEADS = 256, 8


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


@pytest.mark.slow
def test_a_real_selective_step_takes_what_the_traced_one_does() -> None:
    case = Case("llama", activation_checkpointing="selective")
    real, traced = measure_phases(case), trace_phases(case)
    on_host = DEPTH * torch.get_rng_state().nbytes  # saved for every layer, on the host, whatever the device
    for phase in ("forward of layers", "loss", "loss backward", "backward of layers"):
        assert real[phase] - on_host - 500 <= traced[phase] * 1.001 and traced[phase] <= real[phase] * 1.001


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_selective_keeps_what_attention_returns(attention: str) -> None:
    """Beside each layer's input: its attention output, 16 bit, and a fp32 number per row and head."""
    kept = {}
    for kind in ("selective", "full"):
        case = Case("llama", dtype="bf16", attention=attention, activation_checkpointing=kind)
        moments = {one.name: one.ledger for one in trace(case.workload, case.strategy, case.build).moments}
        kept[kind] = moments["loss"].activations
    outputs = DEPTH * BATCH * LENGTH * (WIDTH * 2 + HEADS * 4)
    assert kept["selective"] - kept["full"] == pytest.approx(outputs, abs=DEPTH * 4 * 512)


def test_the_formula_agrees_on_selective() -> None:
    case = Case("llama", dtype="bf16", attention="sdpa", activation_checkpointing="selective")
    traced = trace(case.workload, case.strategy, case.build)
    told = {one.name: one.total_bytes for one in estimate(case.workload, case.strategy).moments}
    for moment in traced.moments:
        # The formula does not see that the model holds its embeddings until its last layer has run.
        slack = BATCH * LENGTH * WIDTH * 2 * 4 if moment.name in ("forward of layers", "evaluation") else 0
        assert moment.total_bytes == pytest.approx(told[moment.name], rel=0.001, abs=slack), moment.name


def test_a_model_without_checkpointing_is_refused() -> None:
    case = Case("llama", activation_checkpointing="full")
    with pytest.raises(ProbeFailed, match="Linear has no gradient_checkpointing_enable"):
        checkpoint(torch.nn.Linear(2, 2), case.strategy, Engine(name="plain"))


@pytest.mark.parametrize("family", ["opt", "t5_gated", "falcon_7b", "falcon_40b"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_recomputed_under_autocast_is_what_was_saved(family: str, method: str) -> None:
    """Layers that call a whole normalisation, which CUDA's autocast widens: in the backward pass it must do so too."""
    options = {"method": method, "dtype": "bf16", "autocast": True, "attention": "sdpa"}
    peaks = {}
    for kind in ("none", "full"):
        case = Case(family, activation_checkpointing=kind, **options)
        peaks[kind] = trace(case.workload, case.strategy, case.build).peak_allocated_bytes
    assert peaks["full"] <= peaks["none"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_widens_what_the_forward_pass_did(reentrant: bool) -> None:
    """As many fp32 normalisations are recomputed as there were; reentrant checkpointing would not notice others."""
    seen: list[torch.dtype] = []
    norm = torch.nn.LayerNorm(8, dtype=torch.bfloat16)
    x = torch.ones(2, 8, dtype=torch.bfloat16, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append(norm(x).dtype)
        return norm(x)

    with CudaAutocast():
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint_function(run, x, use_reentrant=reentrant)
        torch.autograd.backward(out.sum())
    assert seen == [torch.float32] * 2 and x.grad is not None


def test_a_model_that_recomputes_something_else_is_refused() -> None:
    """It computes in fp32 the first time and in 16 bit the second."""
    case = Case("opt", dtype="bf16", autocast=True, attention="sdpa", activation_checkpointing="full")

    def build() -> torch.nn.Module:
        model = case.build()
        layer = model.model.decoder.layers[0]
        norm, calls = layer.final_layer_norm.forward, []

        def forward(x: torch.Tensor) -> torch.Tensor:
            calls.append(x)
            return norm(x) if len(calls) % 2 else norm(x).bfloat16().sin().cos()

        layer.final_layer_norm.forward = forward
        return model

    with pytest.raises(ProbeFailed, match="CheckpointError"):
        trace(case.workload, case.strategy, build, fold=False)

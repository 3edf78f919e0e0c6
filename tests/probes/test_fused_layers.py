"""Fused layer kernels in a model's place: what they keep, what they find, and that nothing else changes."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch

from brim.errors import ProbeFailed
from brim.probes.fused_layers import fuse_layers
from brim.probes.layer_kernels import FusedGate, FusedRmsNorm, FusedRotary
from brim.probes.model import build_from_config
from brim.probes.trace import trace
from brim.probes.tracker import StorageTracker
from brim.spec.strategy import Strategy
from brim.tables.read import find_card
from rows import HIDDEN_FROM_PREDICTOR, read_row
from tiny_models import build_tiny, tiny_config, tiny_inputs

TRUTH = Path(__file__).parents[2] / "benchmarks" / "truth" / "memory.jsonl"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def fuse(family: str, kernels: str, depth: int = 1) -> tuple[torch.nn.Module, list[str]]:
    """Return a tiny model with a package's kernels, and the names of the modules they replace."""
    model = build_tiny(tiny_config(family, depth, attention="eager"), torch.float32)
    fuse_layers(model, Strategy(micro_batch_size=1, gradient_accumulation_steps=1, layer_kernels=kernels))  # type: ignore[arg-type]
    return model, [name.rpartition(".")[2] for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(("family", "kernels", "found"), [
    ("llama", "liger", ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "norm"]),
    ("llama", "unsloth", ["self_attn", "input_layernorm", "post_attention_layernorm", "norm"]),
    ("phi3", "liger", ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "norm"]),
    ("qwen3", "foak", ["self_attn", "q_norm", "k_norm", "input_layernorm", "post_attention_layernorm", "norm"]),
])  # fmt: skip
def test_modules_are_found_by_structure(family: str, kernels: str, found: list[str]) -> None:
    model, names = fuse(family, kernels)
    assert sorted(names) == sorted(found)
    outputs = model(**tiny_inputs(model.config))
    outputs.loss.backward()
    assert outputs.logits.shape[-1] == model.config.vocab_size


def test_a_package_that_finds_nothing_says_so() -> None:
    with pytest.raises(ProbeFailed, match=r"layer kernels liger find nothing to replace in OPTForCausalLM; .* none"):
        fuse("opt", "liger")


def test_other_models_keep_their_code() -> None:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb
    fuse("llama", "liger")
    assert modeling_llama.apply_rotary_pos_emb is original
    assert "forward" not in vars(build_tiny(tiny_config("llama", 1), torch.float32).model.layers[0].self_attn)


@pytest.mark.parametrize(("kernels", "trains"), [("liger", True), ("unsloth", True), ("foak", False)])
def test_gradients_are_those_of_the_model_in_shape_and_dtype(kernels: str, trains: bool) -> None:
    """Of norms' weights under foak there is none: its backward returns none."""
    plain = build_tiny(tiny_config("llama", 1, attention="eager"), torch.float32)
    fused, _ = fuse("llama", kernels)
    for model in (plain, fused):
        model(**tiny_inputs(model.config)).loss.backward()
    theirs = {name: (one.grad.shape, one.grad.dtype) for name, one in plain.named_parameters()}
    ours = {name: (one.grad.shape, one.grad.dtype) for name, one in fused.named_parameters() if one.grad is not None}
    assert ours == {name: grad for name, grad in theirs.items() if trains or "norm" not in name}


def count_made(run: object, *given: torch.Tensor) -> list[int]:
    tracker = StorageTracker(block_bytes=1)
    tracker.follow([(str(index), one) for index, one in enumerate(given)], "input")
    tracker.events.clear()
    with tracker:
        result = run()  # type: ignore[operator]
    assert result is not None
    return [event.num_bytes for event in tracker.events if event.num_bytes > 0]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_norm_keeps_its_input_and_a_scale(in_place: bool) -> None:
    x = torch.zeros(4, 32, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(64, dtype=torch.bfloat16)
    y = FusedRmsNorm.apply(x, weight, in_place, True)
    saved = y.grad_fn.saved_tensors
    assert [(one.numel(), one.dtype) for one in saved] == [
        (x.numel(), torch.bfloat16), (64, torch.bfloat16), (4 * 32, torch.float32)
    ]  # fmt: skip
    gradient = torch.ones_like(y)
    made = count_made(lambda: torch.autograd.grad(y, x, gradient), x, weight, gradient, *saved)
    assert sum(made) == (0 if in_place else x.numel() * 2)


def test_rotation_makes_no_tensor_of_a_projection() -> None:
    projected = torch.zeros(2, 16, 8 * 32, requires_grad=True)
    heads = projected.view(2, 16, 8, 32).transpose(1, 2)
    cos = torch.zeros(1, 16, 32)
    assert count_made(lambda: FusedRotary.apply(heads, heads, cos, cos, True), projected, cos) == []
    wider = torch.zeros(2, 16, 16 * 32)
    sliced = wider[..., : 8 * 32].view(2, 16, 8, 32).transpose(1, 2)
    made = count_made(lambda: FusedRotary.apply(sliced, heads, cos, cos, True), projected, wider, cos)
    assert made == [2 * 16 * 8 * 32 * 4]


def test_a_gate_writes_its_gradients_over_what_it_kept() -> None:
    gate, up = (torch.zeros(4, 16, 64, requires_grad=True) for _ in range(2))
    made = FusedGate.apply(gate, up)
    gradient = torch.ones_like(made)
    assert count_made(lambda: torch.autograd.grad(made, (gate, up), gradient), gate, up, gradient) == []


PUBLISHED = {
    "fms/a100_80gb_liger/meta-llama/Meta-Llama-3-8B/lora/foak-fast-kernels-liger/g1/b4#allocated": {},
    "fms/a100_80gb_liger/meta-llama/Meta-Llama-3-8B/lora/foak-fast-kernels/g1/b8#allocated": {},
    "fms/a100_80gb_liger/mistralai/Mistral-7B-v0.1/lora/foak-fast-kernels-liger/g1/b4#allocated": {"repeats_kv": True},
    "fms/a100_80gb_liger/mistralai/Mistral-7B-v0.1/full/foak-fast-kernels-liger/g1/b16#allocated": {"repeats_kv": True},
    "fms/a100_80gb_liger/mistralai/Mistral-7B-v0.1/lora/accelerated-peft-bnb-foak-liger/g1/b4#allocated": {
        "repeats_kv": True
    },
}


@pytest.mark.parametrize("name", [
    name if index == 0 else pytest.param(name, marks=pytest.mark.slow) for index, name in enumerate(PUBLISHED)
])  # fmt: skip
def test_published_peaks_are_met(name: str) -> None:
    """Measured with torch.cuda.max_memory_allocated on one A100 by fms-acceleration's benchmark, transformers 4.45,
    whose Mistral copies keys and values for every head (models/mistral MistralFlashAttention2)."""
    row = next(row for row in map(json.loads, TRUTH.read_text(encoding="utf-8").splitlines()) if row["id"] == name)
    workload, strategy = read_row({key: value for key, value in row.items() if key not in HIDDEN_FROM_PREDICTOR})
    engine = replace(workload.recipe.engine, **PUBLISHED[name])
    workload = replace(workload, recipe=replace(workload.recipe, engine=engine))
    config = find_card(workload.model.name).config  # type: ignore[union-attr]
    found = trace(workload, strategy, lambda: build_from_config(config, workload.model.architecture, "sdpa"))
    measured = (row["measured"]["low_bytes"] + row["measured"]["high_bytes"]) / 2
    assert found.peak_allocated_bytes == pytest.approx(measured, rel=0.0005)

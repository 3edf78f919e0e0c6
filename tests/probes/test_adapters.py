"""Adapters without weights against PEFT's own on real tensors: what trains, what is kept, whole steps."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peft
import torch
from torch.profiler import ProfilerActivity, profile

from brim.errors import ProbeFailed
from brim.probes.adapters import adapt
from brim.probes.model import give_tensors, prepare_model
from brim.probes.quantized import FourBitLinear, GptqLinear, QuantizedLinear, quantize_base
from brim.probes.quantized_lora import FourBitLora
from brim.probes.trace import trace
from brim.spec.recipe import Engine, Lora, Quantization, Recipe
from real_steps import Case, measure_phases, trace_phases

INPUTS, OUTPUTS, RANK = 256, 384, 8
ENGINE = Engine(name="transformers")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def make_lora(**words: object) -> Lora:
    return Lora(**{"r": RANK, "alpha": 16.0, "target_modules": ("0",), **words})  # type: ignore[arg-type]


def adapted_case(family: str = "llama", *, targets: tuple[str, ...], **words: object) -> Case:
    case = Case(family, method="lora", depth=1)
    case.config._experts_implementation = "batched_mm"  # the grouped product takes no fp32 without data
    lora = make_lora(target_modules=targets, **words)
    case.workload = replace(case.workload, recipe=replace(case.workload.recipe, lora=lora))
    return case


def virtual_case(method: str, family: str = "llama", num_virtual_tokens: int | None = None, **knobs: object) -> Case:
    case = Case(family, **{"depth": 1, **knobs})  # type: ignore[arg-type]
    recipe = replace(case.workload.recipe, method=method, num_virtual_tokens=num_virtual_tokens)  # type: ignore[arg-type]
    case.workload = replace(case.workload, recipe=recipe)
    return case


def count_kept(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return a result and the bytes still held after it was made."""
    gc.collect()  # what an earlier test left is not freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        result = run()
    events = session.profiler.kineto_results.events()  # type: ignore[union-attr]
    return result, sum(one.nbytes() for one in events if one.name() == "[memory]")


def real_layer(kind: str, lora: Lora) -> torch.nn.Module:
    """PEFT's own layer over bitsandbytes' own."""
    nn = pytest.importorskip("bitsandbytes").nn
    if kind == "nf4":
        base = nn.Linear4bit(INPUTS, OUTPUTS, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    else:
        base = nn.Linear8bitLt(INPUTS, OUTPUTS, bias=False, has_fp16_weights=False, threshold=6.0)
    model = torch.nn.Sequential(base.to(torch.bfloat16).to("cpu"))
    if kind == "int8":
        base.weight._quantize("cpu")
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"  # type: ignore[assignment]
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=["0"], use_dora=lora.use_dora
    )
    adapted = peft.get_peft_model(model, config).train()
    assert type(adapted.base_model.model[0]).__module__ == "peft.tuners.lora.bnb"
    return adapted.base_model.model[0]


def stand_in(kind: str, lora: Lora) -> torch.nn.Module:
    recipe = Recipe(method="qlora", quantization=Quantization(kind=kind), lora=lora, engine=ENGINE)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = torch.nn.Sequential(
            torch.nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16), torch.nn.Linear(1, 1)
        )
    quantize_base(model, recipe)
    adapted = adapt(model, recipe).train()
    give_tensors(adapted)
    return adapted.base_model.model[0]  # type: ignore[union-attr, index]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("words", [{}, {"dropout": 0.1}, {"use_dora": True}], ids=["plain", "dropout", "dora"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_layer_over_a_quantised_one_keeps_what_pefts_keeps(
    kind: str, words: dict[str, object], autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT asks whether CUDA's autocast is on; here the CPU's answers."""
    if kind == "int8":  # on a CPU bitsandbytes takes another function for 8 bit
        functions = pytest.importorskip("bitsandbytes.autograd._functions")
        monkeypatch.setattr(functions.MatMul8bitFp, "apply", functions.MatMul8bitLt.apply)
    lora, asked = make_lora(**words), torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": asked(device))
    kept = []
    for layer in (real_layer(kind, lora), stand_in(kind, lora)):
        input = torch.randn(4, 64, INPUTS, dtype=torch.bfloat16)
        input[..., :7] = 9.0
        input.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output, num_bytes = count_kept(lambda layer=layer, input=input: layer(input * 1))  # type: ignore[misc]
        kept.append((num_bytes, output.dtype))
    assert kept[0][0] == pytest.approx(kept[1][0], abs=64)  # scalars from before that die meanwhile
    assert kept[0][1] == kept[1][1]


def test_pefts_layer_over_gptq_is_its_plain_one() -> None:
    """Source: peft tuners/lora/gptq.py GPTQLoraLinear.forward makes the tensors of lora.Linear.forward."""
    layer = stand_in("gptq-int4", make_lora())
    assert type(layer) is peft.tuners.lora.Linear and isinstance(layer.base_layer, GptqLinear)
    layer = stand_in("nf4", make_lora())
    assert type(layer) is FourBitLora and isinstance(layer.base_layer, FourBitLinear)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapters_have_the_recipes_dtype(dtype: str) -> None:
    layer = stand_in("nf4", make_lora(dtype=dtype))
    trained = [one for one in layer.parameters() if one.requires_grad]
    assert {one.dtype for one in trained} == {torch.float32 if dtype == "fp32" else torch.bfloat16}
    assert sum(one.numel() for one in trained) == RANK * (INPUTS + OUTPUTS)
    assert not any(one.requires_grad for one in layer.base_layer.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize(("family", "targets"), [
    ("gpt2", ("all-linear",)), ("mixtral", ("all-linear",)), ("qwen3_moe", ("gate_proj", "up_proj", "q_proj")),
    ("deepseek_v3", ("all-linear",)), ("llama", ("embed_tokens", "q_proj", "lm_head")),
])  # fmt: skip
def test_what_trains_is_what_trains_in_peft(family: str, targets: tuple[str, ...]) -> None:
    case = adapted_case(family, targets=targets)
    mine = prepare_model(case.build, case.workload.recipe, case.strategy)
    wanted = "all-linear" if targets == ("all-linear",) else list(targets)
    real = peft.get_peft_model(case.build(), peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=wanted))
    described = [
        {name: tuple(one.shape) for name, one in model.named_parameters() if one.requires_grad}
        for model in (mine, real)
    ]
    assert described[0] == described[1]


def test_all_linear_reaches_quantised_matrices_and_fused_experts() -> None:
    case = adapted_case("mixtral", targets=("all-linear",))
    recipe = replace(case.workload.recipe, method="qlora", quantization=Quantization(kind="nf4"))
    model = prepare_model(case.build, recipe, case.strategy)
    names = {name for name, one in model.named_parameters() if one.requires_grad}
    assert any("experts" in name for name in names)
    quantised = [name for name, one in model.named_modules() if isinstance(one, QuantizedLinear)]
    assert all(f"{name.removesuffix('.base_layer')}.lora_A.default.weight" in names for name in quantised)
    assert quantised and not any("experts" in name for name in quantised)


STEPS = {
    "dora": lambda: adapted_case(targets=("q_proj", "down_proj"), use_dora=True),
    "prefix tuning": lambda: virtual_case("prefix-tuning", num_virtual_tokens=8),
    "prompt tuning": lambda: virtual_case("prompt-tuning"),
}  # fmt: skip
SLOW = {
    "prompt tuning, checkpointed": lambda: virtual_case("prompt-tuning", activation_checkpointing="full"),
    "dora, dropout": lambda: adapted_case(targets=("q_proj",), use_dora=True, dropout=0.1),
    "fused experts": lambda: adapted_case("mixtral", targets=("all-linear",)),
    "rslora, embeddings": lambda: adapted_case(targets=("embed_tokens", "v_proj"), use_rslora=True),
    "prompt tuning, gpt2": lambda: virtual_case("prompt-tuning", "gpt2"),
    "prefix tuning, qwen2": lambda: virtual_case("prefix-tuning", "qwen2", optimizer_kernel="fused"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*STEPS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_bytes_at_every_phase_are_those_of_a_real_step(name: str) -> None:
    case = (STEPS | SLOW)[name]()
    real, traced = measure_phases(case), trace_phases(case)
    assert set(real) == set(traced)
    for phase, num_bytes in real.items():
        if phase != "before":
            assert traced[phase] == pytest.approx(num_bytes, rel=0.005), (phase, num_bytes, traced[phase])


def test_a_prefix_is_as_long_as_the_model_is_deep() -> None:
    """The prefixes of all layers are one parameter: the layers cannot stand for one another."""
    case = virtual_case("prefix-tuning", depth=7, dtype="bf16", attention="sdpa", num_virtual_tokens=8)
    step = next(one for one in trace(case.workload, case.strategy, case.build).moments if one.name == "optimizer step")
    attention = case.workload.model.groups[0].attention
    width = attention.num_key_value_heads * attention.head_dim
    assert step.ledger.gradients == 8 * 7 * 2 * width * 4


def test_what_peft_does_not_do_is_told() -> None:
    with pytest.raises(ProbeFailed, match="DoRA over GPTQ: PEFT has no such layer; use LoRA"):
        stand_in("gptq-int4", make_lora(use_dora=True))
    case = virtual_case("prefix-tuning", activation_checkpointing="full")
    with pytest.raises(ProbeFailed, match="prefix tuning with checkpointing: PEFT refuses it"):
        trace(case.workload, case.strategy, case.build)
    recipe = Recipe(method="prompt-tuning", engine=ENGINE)
    with pytest.raises(ProbeFailed, match="virtual tokens before Sequential: PEFT needs a task"):
        adapt(torch.nn.Sequential(torch.nn.Linear(1, 1, device="meta")), recipe)

"""What the moments of a step hold, from the code that runs: counted by hand, and beside the trace of that code."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from time_jobs import job, way

from brim.cost.estimate import estimate, profile_strategy
from brim.cost.ledger import Ledger
from brim.spec.recipe import Engine, Lora, Quantization
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

ACCUMULATING = way(2, 2, activation_checkpointing="full")


def at(workload: Workload, strategy: Strategy, name: str) -> Ledger:
    """Return the ledger of a moment."""
    return next(one.ledger for one in estimate(workload, strategy).moments if one.name == name)


def test_capped_logits_pass_through_one_variable() -> None:
    """Evaluation of Gemma 2 holds the last 16-bit logits, their fp32 copy and the log-probabilities: 2 + 4 + 4."""
    workload = job(model="google/gemma-2-2b", method="lora", engine=Engine(name="trl"))
    rows = [row for row in profile_strategy(workload, way(2)).rows if row.name == "evaluation"]
    per_token = max(row.temporaries.per_token for row in rows)
    assert 10 * 256_000 <= per_token < 10.1 * 256_000


def test_a_tied_gradient_waits_for_its_other_half() -> None:
    """With gradients there already, the output's part of a tied matrix is beside them through the backward pass."""
    workload = job(model="Qwen/Qwen2.5-0.5B", engine=Engine(name="trl"))
    table = 2 * workload.model.head[-1].num_weights
    resident = at(workload, ACCUMULATING, "forward of layers").gradients
    assert at(workload, ACCUMULATING, "backward of layers").gradients >= resident + table


def test_autocast_copies_the_upcast_head_until_the_backward_pass() -> None:
    """Its weight is fp32 after PEFT's upcast, and the product saves the 16-bit copy."""
    kept = []
    for upcast in (False, True):
        stored = Quantization(kind="nf4", double_quant=True, upcast_rest=upcast)
        workload = job(method="qlora", quantization=stored, autocast=True)
        rows = [row for row in profile_strategy(workload, ACCUMULATING).rows if row.name == "loss backward"]
        kept.append(max(row.activations.fixed for row in rows))
    assert kept[1] - kept[0] == 2 * 128_256 * 4_096


def test_autocast_caches_adapters_until_the_forward_pass_ends() -> None:
    """Under checkpointing too: 2 bytes for every fp32 element of them."""
    adapter = Lora(r=16, alpha=32, target_modules=("all-linear",), dtype="fp32")
    workload = job(method="lora", lora=adapter, autocast=True)
    temporaries = [row.temporaries for row in profile_strategy(workload, ACCUMULATING).rows if row.name == "loss"]
    gradients = at(workload, ACCUMULATING, "loss").gradients
    assert {one.fixed for one in temporaries} == {gradients // 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"model": "meta-llama/Llama-3.2-1B", "method": "full", "activation_checkpointing": "full"},
        {"model": "meta-llama/Llama-3.2-1B", "method": "qlora", "activation_checkpointing": "full"},
    ],
    ids=lambda case: f"{case['model']}-{case['method']}",
)
def test_every_moment_is_the_traces(case: dict[str, Any]) -> None:
    """Within 3 % at every moment (the forward pass under QLoRA is 2.9 % low), 0.2 % at the peak."""
    pytest.importorskip("torch")
    from brim import api

    options = {"gpu": "h100", "trainer": "transformers", "micro_batch_size": 2, "gradient_accumulation_steps": 2} | case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        formula, trace = api.estimate(options.pop("model"), by=("formula", "trace"), **options)
    assert formula.peak_allocated_bytes == pytest.approx(trace.peak_allocated_bytes, rel=0.002)
    told = {one.name: one.total_bytes for one in formula.moments}
    found = {one.name: told[one.name] for one in trace.moments}
    assert found == pytest.approx({one.name: one.total_bytes for one in trace.moments}, rel=0.03)

"""A model without a loss: traced with the head it is trained with, or refused in a line that says what to pass."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch
import transformers

from brim import api
from brim.errors import ProbeFailed
from brim.probes.heads import explain_no_loss
from brim.probes.trace import trace
from real_steps import Case


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_card_without_a_head_is_traced_with_one(method: str) -> None:
    options = {"gpu": "a100-80gb", "trainer": "transformers", "method": method, "micro_batch_size": 2}
    formula, traced = api.estimate("facebook/bart-base", by=("formula", "trace"), **options)
    assert formula.peak_allocated_bytes == pytest.approx(traced.peak_allocated_bytes, rel=0.015)
    assert any("50265" in str(one.shape) for one in traced.tensors)  # logits


def test_a_model_without_a_loss_is_refused() -> None:
    case = Case("llama", method="lora", attention="sdpa")
    inputs = lambda: {"input_ids": torch.zeros(2, 128, dtype=torch.long)}  # noqa: E731
    with pytest.raises(ProbeFailed, match="LlamaModel returns no loss to train on") as found:
        trace(case.workload, case.strategy, lambda: transformers.LlamaModel(case.config), inputs)
    assert "such as LlamaForCausalLM" in str(found.value) and "\n" not in str(found.value)


def test_classes_of_unknown_kinds_are_not_named() -> None:
    assert "such as" not in explain_no_loss(torch.nn.Linear(1, 1))

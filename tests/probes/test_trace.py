"""The trace end to end: published peaks, the formula beside it, what is refused and how."""

from __future__ import annotations

import json
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

from brim.cost.estimate import estimate
from brim.errors import BrimError, ProbeFailed
from brim.probes.model import build_from_config
from brim.probes.trace import trace
from brim.tables.read import find_card
from real_steps import Case
from rows import HIDDEN_FROM_PREDICTOR, read_row

TRUTH = Path(__file__).parents[2] / "benchmarks" / "truth" / "memory.jsonl"
PUBLISHED = ("vramcalc/a6000/Llama-3.2-1B/full/pure-ckpt", "vramcalc/a6000/Llama-3.2-1B/lora/amp-ckpt")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_peaks_are_met(name: str) -> None:
    """Measured on an RTX A6000 by the author of vramcalc, to 10 MB."""
    lines = TRUTH.read_text(encoding="utf-8").splitlines()
    row = next(row for row in map(json.loads, lines) if row["id"] == name)
    workload, strategy = read_row({key: value for key, value in row.items() if key not in HIDDEN_FROM_PREDICTOR})
    config = find_card(workload.model.name).config  # type: ignore[union-attr]
    found = trace(workload, strategy, lambda: build_from_config(config, workload.model.architecture, "sdpa"))
    measured = (row["measured"]["low_bytes"] + row["measured"]["high_bytes"]) / 2
    assert found.peak_allocated_bytes == pytest.approx(measured, rel=0.002)
    assert found.peak_allocated_bytes <= found.peak_reserved_bytes < found.device_bytes


@pytest.mark.parametrize("case", [
    Case("llama", dtype="bf16", attention="sdpa"),
    Case("llama", dtype="bf16", attention="flash", gradient_accumulation_steps=4),
    Case("llama", autocast=True, attention="sdpa", activation_checkpointing="full"),
    Case("qwen3", dtype="bf16", method="lora", autocast=True, attention="sdpa", optimizer_kernel="fused"),
    Case("mixtral", dtype="bf16", attention="sdpa"),
], ids=lambda case: f"{case.workload.model.name}-{case.strategy.attention_kernel}")  # fmt: skip
def test_the_formula_agrees(case: Case) -> None:
    traced = trace(case.workload, case.strategy, case.build)
    told = estimate(case.workload, case.strategy)
    assert traced.peak_allocated_bytes == pytest.approx(told.peak_allocated_bytes, rel=0.03)
    by_name = {moment.name: moment.ledger for moment in told.moments}
    for moment in traced.moments:
        assert moment.name in by_name
        assert moment.ledger.parameters + moment.ledger.buffers == pytest.approx(
            by_name[moment.name].parameters, rel=0.001
        )
    assert traced.source == "trace" and traced.step_time is None
    assert any("without data" in note for note in traced.notes)


def test_the_same_question_has_the_same_answer() -> None:
    case = Case("llama", dtype="bf16", attention="sdpa")
    assert trace(case.workload, case.strategy, case.build) == trace(case.workload, case.strategy, case.build)


@pytest.mark.parametrize(("knobs", "words"), [
    ({"compile": True}, "torch.compile: not traced yet"),
])  # fmt: skip
def test_what_is_not_traced_is_said(knobs: dict[str, object], words: str) -> None:
    case = Case("llama", **knobs)
    with pytest.raises(ProbeFailed, match=words):
        trace(case.workload, case.strategy, case.build)


def test_a_model_that_fails_is_told_in_one_line_with_its_place() -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4))

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.weight[torch.nonzero(self.weight)]

    case = Case("llama")
    with pytest.raises(ProbeFailed, match=r"values of a tensor.*test_trace\.py:\d+") as caught:
        trace(case.workload, case.strategy, Broken)
    assert "\n" not in str(caught.value)


def test_a_constructor_that_fails_is_told() -> None:
    def build() -> torch.nn.Module:
        raise OSError("no such file\nat all")

    case = Case("llama")
    with pytest.raises(ProbeFailed, match="cannot be built without weights: OSError: no such file"):
        trace(case.workload, case.strategy, build)


def test_an_unknown_class_is_told() -> None:
    with pytest.raises(BrimError, match="has no class 'LlamaForFortuneTelling'"):
        build_from_config({"model_type": "llama"}, "LlamaForFortuneTelling", "sdpa")

"""The tapes against autograd: what a layer of a real transformers model keeps, and how high a step reaches."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from layer_peaks import measure_peak, predict_peak
from saved_tensors import CASES, EAGER_ONLY, compare, runs
from tiny_models import FAMILIES

TOLERANCE = 0.02
USUAL = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "mixtral", "deepseek_v3",
    "gpt_oss",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def _attention(family: str) -> str:
    return "eager" if family in EAGER_ONLY else "sdpa"


@pytest.mark.parametrize("case", ["full-bf16", "lora-all-autocast"])
@pytest.mark.parametrize("family", USUAL)
def test_a_layer_keeps_what_autograd_keeps(family: str, case: str) -> None:
    found = compare(family, CASES[case], _attention(family))
    assert abs(found.ratio - 1) <= TOLERANCE, found[:2]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_keeps_what_autograd_keeps(family: str, case: str, attention: str) -> None:
    if not runs(family, CASES[case], attention):
        pytest.skip("transformers or PEFT has no such case")
    found = compare(family, CASES[case], attention)
    assert abs(found.ratio - 1) <= TOLERANCE, found[:2]


@pytest.mark.parametrize("case", ["full-bf16", "full-fp32-autocast", "lora-attention-bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_step_reaches_as_high_as_it_really_does(family: str, case: str) -> None:
    told, real = (ask(family, CASES[case], _attention(family)) for ask in (predict_peak, measure_peak))
    assert told.step_bytes == pytest.approx(real.step_bytes, rel=0.03)
    assert told.layers_bytes == pytest.approx(real.layers_bytes, rel=0.03)

"""One choice of kernel: the formula's tape of plain products beside the trace of the model's own code."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from brim.cost.attention_kernels import AttentionCall, choose_kernel, explain_no_flash

PLAIN: dict[str, Any] = {
    "dtype": "bf16", "query_heads": 8, "key_heads": 8, "key_width": 64, "value_width": 64, "grouped": False,
    "masked": False, "capability": (8, 0),
}  # fmt: skip


@pytest.mark.parametrize(("words", "kernel"), [
    ({}, "flash"), ({"key_heads": 2, "grouped": True}, "flash"), ({"key_heads": 1}, "math"),
    ({"key_heads": 1, "masked": True}, "math"), ({"key_heads": 2, "grouped": True, "masked": True}, "math"),
    ({"masked": True}, "efficient"), ({"oblong": True}, "efficient"), ({"dtype": "fp32"}, "efficient"),
    ({"dtype": "fp32", "key_heads": 2, "grouped": True}, "math"), ({"capability": (7, 5)}, "math"),
    ({"capability": (7, 5), "dtype": "fp16"}, "efficient"), ({"value_width": 32}, "efficient"),
    ({"key_width": 12, "value_width": 12, "masked": True}, "math"),
])  # fmt: skip
def test_the_kernel_of_a_call(words: dict[str, Any], kernel: str) -> None:
    assert choose_kernel(AttentionCall(**PLAIN | words)) == kernel


def test_what_flash_cannot_run_says_why() -> None:
    assert explain_no_flash(AttentionCall(**PLAIN)) is None
    assert "256" in (explain_no_flash(AttentionCall(**PLAIN | {"value_width": 32})) or "")


@pytest.mark.parametrize(("family", "words"), [
    ("falcon_7b", {"dtype": "bf16"}), ("falcon_7b", {"autocast": True}),
    ("falcon_7b", {"dtype": "bf16", "activation_checkpointing": "full"}),
    ("llama", {}), ("llama", {"dtype": "fp16", "gpu": "t4"}), ("qwen2", {"dtype": "bf16", "gpu": "v100-32gb"}),
])  # fmt: skip
def test_plain_attention_costs_what_the_trace_sees(family: str, words: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from brim.cost.estimate import estimate
    from brim.probes.trace import trace
    from real_steps import Case

    case = Case(family, attention="sdpa", **words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = trace(case.workload, case.strategy, case.build)
    told = estimate(case.workload, case.strategy)
    assert case.strategy.activation_checkpointing == "full" or any("softmax" in one.op for one in traced.tensors)
    assert told.peak_allocated_bytes == pytest.approx(traced.peak_allocated_bytes, rel=0.01)

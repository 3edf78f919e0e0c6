"""What is kept of embeddings: beside the trace, whose models run their own code."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from brim import api


@pytest.mark.parametrize(("model", "share"), [
    ("google-bert/bert-base-uncased", 0.003), ("bigscience/bloom-560m", 0.001), ("facebook/bart-base", 0.008),
])  # fmt: skip
def test_normalised_embeddings_keep_what_the_trace_sees(model: str, share: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        formula, trace = api.estimate(
            model, by=("formula", "trace"), gpu="h100", trainer="transformers", method="full", seq_len=512,
            micro_batch_size=2, activation_checkpointing="none",
        )  # fmt: skip
    assert formula.peak_allocated_bytes == pytest.approx(trace.peak_allocated_bytes, rel=share)

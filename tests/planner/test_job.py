from __future__ import annotations

import pytest
from planner_toys import make_job

from brim.errors import InvalidInput


def test_defaults_are_said() -> None:
    assert make_job(gpu="rtx-4090").assumptions == (
        "trainer trl",
        "task instruction-tuning",
        "method lora (adapters on a 16-bit base)",
        "dtype bf16",
        "optimizer adamw (fused kernel)",
        "LoRA rank 16",
        "LoRA alpha 32, twice the rank",
        "LoRA on every attention and feed-forward matrix: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
        "down_proj",
        "left to itself trl loads weights in fp32, cuts at 1,024 tokens, full checkpointing; what is exported sets "
        "each explicitly",
        "sequences of 2,048 tokens",
        "effective batch 32 sequences: low end of the optimal range of instruction-tuning, 32-64 sequences",
        "1 epoch",
    )


def test_what_is_said_is_not_assumed() -> None:
    job = make_job(
        method="full", trainer="plain", task="chat", dtype="fp32", optimizer="sgd", seq_len=512,
        effective_batch_size=64, epochs=2,
    )  # fmt: skip
    assert job.assumptions == ()


def test_the_length_is_no_longer_than_the_positions() -> None:
    job = make_job("gpt2")
    assert job.workload.data.seq_len == 1024
    assert "sequences of 1,024 tokens, all the positions openai-community/gpt2 has" in job.assumptions


def test_vision_models_have_one_length() -> None:
    job = make_job("google/vit-base-patch16-224", method="full")
    assert job.workload.data.seq_len == 197
    with pytest.raises(InvalidInput, match="always reads 197 tokens, not 512; leave seq_len out"):
        make_job("google/vit-base-patch16-224", method="full", seq_len=512)

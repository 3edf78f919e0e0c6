"""Operations against published counts, closed forms and brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from time_jobs import job, read_card, way

from brim.cost.flops import count_attention_flops, count_flops, count_pairs, sequence_tokens
from brim.cost.parameters import count_lora_parameters, count_matmul_parameters
from brim.spec.model import Attention
from brim.tables.read import list_cards

LLAMA_70B = "meta-llama/Meta-Llama-3-70B"


def per_token(flops: float, seq_len: int) -> float:
    return flops / seq_len


def test_llama_3_70b_full_is_what_megatron_bridge_prints() -> None:
    """432.5 GFLOP a token in its performance table (facts/scale.md 3.1): 6N and the causal half of attention."""
    flops = count_flops(job(model=LLAMA_70B, seq_len=4096), way(1))
    assert per_token(flops.total, 4096) / 1e9 == pytest.approx(432.5, rel=0.002)


def test_llama_3_70b_lora_is_the_consistent_value() -> None:
    """294 GFLOP a token: 4N, attention unchanged, and the adapters (facts/scale.md 3.1)."""
    workload = job(model=LLAMA_70B, seq_len=4096, method="lora")
    flops = count_flops(workload, way(1))
    adapters = 6 * count_lora_parameters(workload.model, workload.recipe.lora, True)
    assert (per_token(flops.total, 4096) - adapters) / 1e9 == pytest.approx(294, rel=0.002)


@pytest.mark.parametrize("seq_len", [512, 4096])
def test_a_dense_model_needs_six_n_and_six_l_h_s(seq_len: int) -> None:
    shape = read_card("gpt2")
    flops = count_flops(job(model="gpt2", seq_len=seq_len), way(1))
    attention = 6 * shape.num_hidden_layers * shape.hidden_size * (seq_len + 1)
    assert per_token(flops.total, seq_len) == pytest.approx(6 * count_matmul_parameters(shape) + attention)


def test_full_checkpointing_repeats_the_layers_but_not_the_head() -> None:
    workload = job()
    none, full = (count_flops(workload, way(activation_checkpointing=kind)) for kind in ("none", "full"))
    head = 2 * 4 * 2048 * workload.model.head[-1].num_weights
    assert full.model == none.model == none.total
    assert full.total - none.total == pytest.approx(none.matmul_forward - head + none.attention_forward)


def test_selective_checkpointing_keeps_the_attention_kernel() -> None:
    flops = count_flops(job(), way(activation_checkpointing="selective"))
    eager = count_flops(job(), way(activation_checkpointing="selective", attention_kernel="eager"))
    assert flops.attention_recompute == 0 < flops.matmul_recompute
    assert eager.attention_recompute == eager.attention_forward


def test_lora_with_checkpointing_costs_six_n() -> None:
    """With full recomputation adapters save 2N of 8N, not 2N of 6N (facts/scale.md 3.1)."""
    full, lora = (
        count_flops(job(method=method), way(activation_checkpointing="full")).total for method in ("full", "lora")
    )
    assert lora / full == pytest.approx(6 / 8, abs=0.03)


def test_a_chunked_loss_computes_logits_twice() -> None:
    dense, chunked = (count_flops(job(), way(loss_kernel=kind)).matmul_recompute for kind in ("dense", "chunked"))
    assert chunked - dense == 2 * 4 * 2048 * job().model.head[-1].num_weights


def test_only_visited_experts_count() -> None:
    """Mixtral 8x7B: 12.9 billion active parameters (arXiv 2401.04088), 0.13 of them the input table."""
    workload = job(model="mistralai/Mixtral-8x7B-v0.1")
    forward = count_flops(workload, way(1)).matmul_forward / (2 * sequence_tokens(workload))
    assert forward == pytest.approx(12.9e9 - 0.13e9, rel=0.005)


def test_sequences_add_up() -> None:
    one, many = count_flops(job(), way(1)), count_flops(job(), way(7))
    assert many.total == pytest.approx(7 * one.total)


def test_cross_attention_counts() -> None:
    """T5 has two attentions in each layer of the decoder, one in each of the encoder's, which has no mask."""
    shape = read_card("google-t5/t5-small")
    s, decoders = 128, sum(group.count for group in shape.groups if group.stack == "decoder")
    pairs = (shape.num_hidden_layers - decoders) * s * s + decoders * (s * (s + 1) // 2 + s * s)
    assert count_attention_flops(shape, s) == pytest.approx(4 * pairs * shape.groups[0].attention.q_size)


def attention(*, causal: bool, window: int | None) -> Attention:
    return Attention(
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, v_head_dim=8, linears=(), causal=causal,
        sliding_window=window,
    )  # fmt: skip


@given(st.integers(1, 60), st.none() | st.integers(1, 80))
def test_causal_pairs_by_brute_force(seq_len: int, window: int | None) -> None:
    seen = sum(
        1 for q in range(seq_len) for k in range(q + 1) if window is None or q - k < window
    )  # fmt: skip
    assert count_pairs(attention(causal=True, window=window), seq_len) == seen


@given(st.integers(1, 60), st.none() | st.integers(1, 80))
def test_encoder_pairs_by_brute_force(seq_len: int, window: int | None) -> None:
    side = seq_len if window is None or 2 * (window // 2) + 1 >= seq_len else window // 2
    seen = sum(1 for q in range(seq_len) for k in range(seq_len) if abs(q - k) <= side)
    assert count_pairs(attention(causal=False, window=window), seq_len) == seen


@pytest.mark.parametrize("card", [card.id for card in list_cards()])
def test_matmul_parameters_agree_with_the_parameter_count(card: str) -> None:
    shape = read_card(card)
    workload = replace(job(), model=shape)
    forward = count_flops(workload, way(1)).matmul_forward / (2 * sequence_tokens(workload))
    assert forward == pytest.approx(count_matmul_parameters(shape), rel=1e-9)

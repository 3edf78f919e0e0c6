from __future__ import annotations

from dataclasses import replace

import pytest
from planner_toys import make_job

from brim.errors import InvalidStrategy
from brim.planner.candidates import check_strategy, list_splits, list_variants
from brim.planner.rules import broken_rule
from brim.spec.strategy import Strategy


def test_splits_respect_ranks_and_what_is_fixed() -> None:
    workload = make_job(gpu="h100:4", effective_batch_size=48).workload
    assert list_splits(workload, {}) == ((1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1))
    assert list_splits(workload, {"micro_batch_size": 3}) == ((3, 4),)
    assert list_splits(workload, {"gradient_accumulation_steps": 2}) == ((6, 2),)
    with pytest.raises(InvalidStrategy, match="no split of 48 sequences over 4 ranks with micro_batch_size 5"):
        list_splits(workload, {"micro_batch_size": 5})


@pytest.mark.parametrize("trainer", ["trl", "transformers", "unsloth", "accelerate", "plain"])
def test_every_variant_keeps_the_rules(trainer: str) -> None:
    workload = make_job(trainer=trainer).workload
    variants = list_variants(workload, {})
    assert len({variant.at(1, 32) for variant in variants}) == len(variants) >= 2
    assert all(broken_rule(workload, variant.at(1, 32)) is None for variant in variants)


def test_kernels_that_need_a_package_or_only_cost_are_asked_for() -> None:
    workload = make_job().workload
    assert {variant.knobs["attention_kernel"] for variant in list_variants(workload, {})} == {"sdpa"}
    for kernel in ("flash", "eager"):
        fixed = list_variants(workload, {"attention_kernel": kernel})
        assert {variant.knobs["attention_kernel"] for variant in fixed} == {kernel}


def test_models_without_sdpa_are_eager() -> None:
    workload = make_job("google/gemma-2-2b").workload
    assert {variant.knobs["attention_kernel"] for variant in list_variants(workload, {})} == {"eager"}


def test_unsloth_may_move_activations_to_the_host() -> None:
    knobs = [variant.knobs for variant in list_variants(make_job(trainer="unsloth").workload, {})]
    assert {(knob["activation_checkpointing"], knob["activation_offload"]) for knob in knobs} == {
        ("none", False), ("full", False), ("full", True),
    }  # fmt: skip


def test_one_strategy_is_checked_like_any_candidate() -> None:
    workload = make_job().workload
    strategy = Strategy(micro_batch_size=4, gradient_accumulation_steps=8, loss_kernel="chunked")
    assert check_strategy(workload, strategy) is strategy
    with pytest.raises(InvalidStrategy, match="is 36 sequences, not the effective batch 32"):
        check_strategy(workload, replace(strategy, gradient_accumulation_steps=9))

"""Every row of the field's rule of thumb, as it is told."""

from __future__ import annotations

from typing import Any

import pytest

from brim.cost.rule import GB, count_billions, estimate_rule, find_row, model_bytes, rule_budget_bytes, rule_peak_bytes
from brim.planner.answerer import answer_by_rule
from brim.planner.batch import exact_splits
from brim.planner.job import Job, build_job
from brim.planner.options import read_options
from brim.planner.plan import plan_workload
from brim.planner.record import Plan
from brim.readers.hardware import read_cluster
from brim.readers.sources import read_model
from brim.spec.strategy import Strategy
from brim.tables.read import RuleRow, list_rule_rows, read_rule_constants, read_rule_patterns, read_rule_targets


def job(size: str, gpu: str, **options: Any) -> Job:
    return build_job(read_model(size)[0], read_cluster(gpu)[0], read_options(options))


def plan(size: str, gpu: str, **options: Any) -> Plan:
    made = job(size, gpu, **options)
    return plan_workload(made.workload, made.fixed, answer_by_rule())


def row_id(row: RuleRow) -> str:
    return f"{row.card_gb:g}GB-{row.billions:g}B"


def test_the_matrix_is_the_issues() -> None:
    rows = {(row.card_gb, row.billions): (row.micro_batch, row.accumulation) for row in list_rule_rows()}
    assert rows == {
        (8, 7): ((1, 2), (8, 16)),
        (16, 7): ((4, 8), (4, 8)),
        (24, 7): ((8, 16), (2, 4)),
        (24, 13): ((2, 4), (8, 16)),
        (40, 70): ((1, 2), (16, 32)),
    }


@pytest.mark.parametrize("row", list_rule_rows(), ids=row_id)
@pytest.mark.parametrize("unit", ["GB", "GiB"])
def test_matrix_rows_come_out_exactly(row: RuleRow, unit: str) -> None:
    made = plan(f"{row.billions:g}B", f"{row.card_gb:g}{unit}", method="qlora")
    strategy = made.strategy
    assert strategy.micro_batch_size == row.micro_batch[1]
    assert row.accumulation[0] <= strategy.gradient_accumulation_steps <= row.accumulation[1]
    assert made.estimate.peak_allocated_bytes <= made.budget_bytes


@pytest.mark.parametrize(
    ("size", "gpu", "micro"),
    [("7B", "rtx-4090", 16), ("13B", "rtx-3090", 4), ("7B", "t4", 8), ("70B", "a100-sxm4-40gb", 2), ("70B", "h100", 2)],
)
def test_real_cards_count_as_their_marketing_size(size: str, gpu: str, micro: int) -> None:
    assert plan(size, gpu, method="qlora").strategy.micro_batch_size == micro


@pytest.mark.parametrize("pattern", read_rule_patterns(), ids=lambda row: f"{row['devices']}x{row['card_gb']}GB")
def test_patterns_come_out_exactly(pattern: dict[str, Any]) -> None:
    split = (pattern["micro_batch"], pattern["accumulation"])
    sequences = split[0] * split[1] * pattern["devices"]
    made = plan(
        f"{pattern['billions']}B", f"{pattern['card_gb']}GB:{pattern['devices']}", method="lora",
        effective_batch_size=sequences,
    )  # fmt: skip
    assert (made.strategy.micro_batch_size, made.strategy.gradient_accumulation_steps) == split
    constants = read_rule_constants()
    micro, steps = constants.micro_batch_with_checkpointing, constants.accumulation_with_checkpointing
    assert micro[0] <= split[0] <= micro[1] and steps[0] <= split[1] <= steps[1]


def test_the_patterns_are_the_issues() -> None:
    rows = {(row["billions"], row["card_gb"], row["devices"]): (row["micro_batch"], row["accumulation"])
            for row in read_rule_patterns()}  # fmt: skip
    assert rows == {(7, 24, 1): (1, 32), (7, 24, 2): (2, 8), (13, 80, 1): (4, 8), (70, 80, 8): (1, 8)}


@pytest.mark.parametrize("target", read_rule_targets(), ids=lambda row: f"{row['sequences']}-on-{row['devices']}")
def test_targets_split_as_told(target: dict[str, Any]) -> None:
    splits = set(exact_splits(target["sequences"], target["devices"]))
    assert {tuple(split) for split in target["splits"]} <= splits
    assert all(micro * steps * target["devices"] == target["sequences"] for micro, steps in splits)


def test_the_targets_are_the_issues() -> None:
    told = {(row["sequences"], row["devices"]): row["splits"] for row in read_rule_targets()}
    assert told == {
        (32, 1): [[2, 16], [4, 8], [8, 4], [16, 2]], (8, 1): [[2, 4]], (64, 1): [[4, 16], [8, 8]], (64, 2): [[4, 8]],
    }  # fmt: skip


def test_weights_take_what_the_saying_says() -> None:
    assert model_bytes(7, 4) == 3.5 * GB and model_bytes(7, 16) == 14 * GB
    assert model_bytes(70, 16, num_devices=8) == 17.5 * GB


def answer(micro: int = 1, length: int = 2048, **knobs: Any) -> int:
    workload = job("7B", "24GB", method="qlora", seq_len=length).workload
    strategy = Strategy(micro_batch_size=micro, gradient_accumulation_steps=32 // micro, **knobs)
    estimate = estimate_rule(workload, strategy)
    assert estimate.source == "rule" and estimate.peak_moment == "training"
    assert estimate.peak_allocated_bytes == rule_peak_bytes(workload, strategy) == estimate.moments[0].total_bytes
    return estimate.moments[0].ledger.activations


def test_activations_grow_as_told() -> None:
    full = {"activation_checkpointing": "full"}
    assert answer(4, **full) == pytest.approx(4 * answer(1, **full))
    assert answer(1, 4096, **full) == pytest.approx(2 * answer(1, **full))
    assert answer(1, 4096, attention_kernel="eager", **full) == pytest.approx(4 * answer(1, **full))
    assert answer(1, **full) == pytest.approx(0.5 * answer(1))
    assert 0.4 <= 1 - answer(1, activation_checkpointing="selective") / answer(1) <= 0.6


def test_the_budget_is_90_percent_of_what_remains() -> None:
    workload = job("7B", "24GB", method="qlora").workload
    assert rule_budget_bytes(workload) == 5.5 * GB + 0.9 * 18.5 * GB


@pytest.mark.parametrize(
    ("model", "billions"), [("7B", 7), ("meta-llama/Llama-3.1-8B", 8), ("gpt2", 0.124), ("Qwen/Qwen2.5-0.5B", 0.5)]
)
def test_sizes_are_taken_as_people_say_them(model: str, billions: float) -> None:
    assert count_billions(job(model, "24GB").workload) == billions


def test_the_nearest_row() -> None:
    row = find_row(8, 4, 30)
    assert row is not None and (row.billions, row.card_gb) == (7, 24)
    smallest = find_row(13, 4, 8)
    assert smallest is not None and (smallest.billions, smallest.card_gb) == (13, 24)
    assert find_row(7, 16, 24) is None


def test_a_model_beyond_the_open_row_has_the_whole_card() -> None:
    made = plan("zai-org/GLM-4.5-Air", "96GB", method="qlora")
    assert made.strategy.micro_batch_size >= 1 and made.budget_bytes > 55 * GB

"""A plan as text: the verdict first, nothing wider than the terminal, nothing the user wrote taken as markup."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brim.report.commands import break_command
from brim.report.plan import format_plan

SECTIONS = ("Why", "Memory at the peak (loss)", "Alternatives (5 of 95)", "Assumed", "Warnings", "Schedule", "Next")


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_nothing_is_wider_than_the_terminal(plans: Any, render: Callable[..., str], width: int) -> None:
    command = "brim plan meta-llama/Llama-3.1-8B --gpu rtx-4090 --method qlora --dataset 'my data.jsonl' --export trl"
    text = render(format_plan(plans.make_plan(), next_commands=[command]), width)
    assert max(map(len, text.splitlines())) <= width


def test_the_verdict_comes_first(plans: Any, render: Callable[..., str]) -> None:
    first = render(format_plan(plans.make_plan())).splitlines()[0]
    assert first == "Fits: micro-batch 4 x accumulation 8 x 1 GPU = 32 sequences per optimizer step"


def test_a_plan_over_capacity_says_so(plans: Any, render: Callable[..., str]) -> None:
    plan = plans.make_plan(budget_bytes=10 * 2**30)
    assert render(format_plan(plan)).startswith("Does not fit: ")


def test_the_verdict_is_the_planners(plans: Any, render: Callable[..., str]) -> None:
    """Allocated against budget; what the driver shows may be above the card, where states are paged."""
    estimate = plans.make_estimate()
    plan = plans.make_plan(estimate=replace(estimate, device_bytes=100 * 2**30))
    assert render(format_plan(plan)).startswith("Fits: ")


def test_paged_states_stand_beside_the_sum(plans: Any, render: Callable[..., str]) -> None:
    estimate = plans.make_estimate(device_bytes=50 * 2**30)
    workload = plans.make_workload()
    workload = replace(workload, recipe=replace(workload.recipe, optimizer="paged-adamw-32bit"))
    plan = plans.make_plan(estimate=estimate, workload=workload)
    text = render(format_plan(plan))
    assert "paged states (move to host when the card is full)" in text.split("Memory at the peak")[1]
    assert " ".join(text.split()).count("free -") == 0 and "-" not in text.split("\n  free ")[1].split("\n")[0]


def test_every_section_is_there_in_order(plans: Any, render: Callable[..., str]) -> None:
    lines = render(format_plan(plans.make_plan(), next_commands=["brim export plan.json trl"])).splitlines()
    assert [line for line in lines if line in SECTIONS] == list(SECTIONS)


def test_every_number_has_a_source_and_its_error(plans: Any, render: Callable[..., str]) -> None:
    text = render(format_plan(plans.make_plan()))
    flat = " ".join(text.split())
    assert "formula; on published runs its allocated peak was at most 0.90 GiB too low in 9 of 10; nvidia-smi" in flat
    assert "nvidia-smi figure: median error" in flat
    assert "formula (unmeasured on this card)" in text
    tried = plans.make_plan(estimate=plans.make_estimate("trial", margin_bytes=0))
    assert "trial: measured in real optimizer steps on this device" in render(format_plan(tried))
    rule = " ".join(render(format_plan(plans.make_plan(estimate=plans.make_estimate("rule", margin_bytes=0)))).split())
    assert "rule; on published runs its allocated peak was wrong by " in rule and " % in 9 of 10" in rule


def test_ledger_rows_sum_to_what_is_used(plans: Any, render: Callable[..., str]) -> None:
    text = render(format_plan(plans.make_plan()))
    ledger = text.split("Memory at the peak (loss)\n")[1].split("\n\n")[0].splitlines()[1:]
    numbers = {line[:18].strip(): float(line.split("%")[0].replace("<", "").split()[-2]) for line in ledger}
    used, free = numbers.pop("used"), numbers.pop("free")
    assert sum(numbers.values()) == pytest.approx(used, abs=0.03)
    assert used + free == pytest.approx(23.5, abs=0.01)


def test_unknown_speed_and_schedule_are_said(plans: Any, render: Callable[..., str]) -> None:
    plan = plans.make_plan(estimate=plans.make_estimate("rule", step_time=None, moments=(), peak_moment=""))
    schedule = replace(plan.schedule, num_sequences=None, steps_per_epoch=None, total_steps=None, epoch_seconds=None)
    text = render(format_plan(replace(plan, schedule=schedule, rejected=(), warnings=(), reasons=())))
    assert "not predicted: rule knows no rates of rtx-4090" in text
    assert "per epoch" not in text and "Alternatives" not in text and "Warnings" not in text


def test_free_memory_is_named_as_such(plans: Any, render: Callable[..., str]) -> None:
    plan = plans.make_plan()
    cluster = plan.workload.cluster
    device = replace(cluster.device, free_bytes=20 * 2**30)
    workload = replace(plan.workload, cluster=replace(cluster, device=device, devices_per_node=2))
    text = render(format_plan(replace(plan, workload=workload, capacity_bytes=20 * 2**30)))
    assert "only what is free now counts, of 23.50 GiB" in " ".join(text.split())
    assert "tokens/s per GPU" in text and "2 x rtx-4090" in text


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/]", ":smile:", "x" * 200, "名前/モデル"])
def test_the_users_words_are_no_markup(plans: Any, render: Callable[..., str], name: str) -> None:
    plan = plans.make_plan(workload=plans.make_workload(model=plans.make_model(name)), reasons=(name,))
    text = render(format_plan(plan), 80)
    assert name in text.replace("\n", "").replace(" ", "")


def test_an_ascii_terminal_gets_ascii(plans: Any, render: Callable[..., str]) -> None:
    assert "####" in render(format_plan(plans.make_plan()), 80, "ascii")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(number=st.integers(min_value=0, max_value=2**62), width=st.integers(min_value=40, max_value=130))
def test_no_number_breaks_the_report(plans: Any, render: Callable[..., str], number: int, width: int) -> None:
    ledger = plans.make_ledger(parameters=number / 2**30)
    moment = plans.Moment(name="loss", ledger=ledger)
    estimate = plans.make_estimate(moments=(moment,), peak_moment="loss", device_bytes=number)
    plan = plans.make_plan(estimate=estimate, capacity_bytes=number, budget_bytes=number // 2)
    assert max(map(len, render(format_plan(plan), width).splitlines())) <= width


@given(st.lists(st.from_regex(r"[a-z0-9./=-]{1,30}|'[a-z ]{1,20}'", fullmatch=True), min_size=1, max_size=20))
def test_a_broken_command_is_the_same_command(words: list[str]) -> None:
    lines = break_command(" ".join(words), 60)
    assert all(line.endswith(" \\") for line in lines[:-1])
    joined = " ".join(line.removesuffix(" \\").strip() for line in lines)
    assert joined == " ".join(words)
    assert all(len(line) <= 68 for line in lines), "a flag and its value may be longer than the width"


def test_a_flag_stays_with_its_value() -> None:
    assert break_command("brim plan 8B --gpu t4 --json --export trl", 20) == [
        "brim plan 8B \\", "    --gpu t4 \\", "    --json \\", "    --export trl",
    ]  # fmt: skip

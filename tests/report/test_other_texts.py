"""Estimates side by side, refusals, listings and exports as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from brim.exporters.record import Export, ExportFile
from brim.report.estimates import format_estimates
from brim.report.exports import format_export
from brim.report.listings import format_devices, format_facts, format_models, format_optimizers, format_tasks
from brim.report.refusal import format_does_not_fit
from brim.tables.read import list_cards, list_devices, list_optimizers, list_sizes, list_tasks


def make_rule(plans: Any) -> Any:
    return plans.make_estimate(
        "rule", moments=(), peak_moment="", step_time=None, margin_bytes=0, notes=(),
        peak_allocated_bytes=8 * 2**30, peak_reserved_bytes=8 * 2**30, device_bytes=10 * 2**30,
    )  # fmt: skip


def test_answers_stand_side_by_side_with_their_difference(plans: Any, render: Callable[..., str]) -> None:
    text = render(format_estimates([make_rule(plans), plans.make_estimate()], title="8B, micro-batch 4"))
    assert text.startswith("8B, micro-batch 4\n")
    assert "allocated at the peak      8.00    16.80            -52 %" in text
    assert "rule; on published runs its allocated peak was wrong by " in text


def test_moments_and_rows_are_all_there(plans: Any, render: Callable[..., str]) -> None:
    estimate = plans.make_estimate()
    text = render(format_estimates([estimate], capacity_bytes=24 * 2**30), 80)
    assert all(moment.name.split()[0] in text for moment in estimate.moments)
    assert "free of the card" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_refusal_names_the_gap_and_what_would_fit(plans: Any, render: Callable[..., str]) -> None:
    text = render(format_does_not_fit(plans.make_refusal()))
    assert text.startswith("Does not fit: 40.40 GiB short at optimizer step")
    assert "--method lora           yes      18.40" in text


def test_a_refusal_without_a_way_out_says_so(plans: Any, render: Callable[..., str]) -> None:
    error = plans.DoesNotFit("no", gap_bytes=2**30, at_moment="loss")
    assert "no single change makes it fit" in render(format_does_not_fit(error))


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("make", [
    lambda: (format_devices(list_devices()), len(list_devices())),
    lambda: (format_models(list_cards(), list_sizes()), len(list_cards())),
    lambda: (format_tasks(list_tasks()), len(list_tasks())),
    lambda: (format_optimizers(list_optimizers()), len(list_optimizers())),
])  # fmt: skip
def test_listings_fit_and_are_counted(make: Callable[[], Any], render: Callable[..., str], width: int) -> None:
    report, count = make()
    text = render(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert f"\n{count} " in text
    assert "…" not in text


def test_facts_are_two_columns(render: Callable[..., str]) -> None:
    assert render(format_facts({"python": "3.11", "HF_TOKEN": "set"})) == "python    3.11\nHF_TOKEN  set"


def test_an_export_ends_with_what_to_type(render: Callable[..., str]) -> None:
    export = Export(
        target="trl", dialect="trl>=1.15", keywords={"per_device_train_batch_size": 4}, outside={"max_length": 2048},
        files=(ExportFile(name="train.py", text=""),), launch="python train.py", notes=("needs trl",),
    )  # fmt: skip
    lines = render(format_export(export, next_commands=["python train.py"])).splitlines()
    assert lines[0] == "trl, for trl>=1.15"
    assert "  per_device_train_batch_size  4" in lines
    assert lines[-1] == "  python train.py"

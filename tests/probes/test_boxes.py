"""Detection targets and the stand-in for the solver that matches them, with the real model and its real loss."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch
import transformers
from transformers.loss import loss_for_object_detection

from architectures import Case, plan_case
from brim.probes.boxes import BOXES_PER_IMAGE, make_targets, match_in_order
from brim.probes.inputs import plan_inputs
from brim.probes.trace import trace

YOLOS = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 10,
}  # fmt: skip


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.YolosForObjectDetection(transformers.AutoConfig.for_model("yolos", **YOLOS))


def test_targets_are_classes_and_boxes_image_by_image() -> None:
    targets = make_targets(3, torch.bfloat16)
    assert len(targets) == 3
    assert targets[0]["class_labels"].shape == (BOXES_PER_IMAGE,)
    assert targets[0]["boxes"].shape == (BOXES_PER_IMAGE, 4) and targets[0]["boxes"].dtype == torch.bfloat16


def test_the_real_loss_runs_on_them_with_the_stand_in() -> None:
    model = build()
    workload, strategy = plan_case(Case("", "", "YolosForObjectDetection"))
    inputs = plan_inputs(workload, strategy, model)()
    with match_in_order(model) as said:
        loss = model(**inputs).loss
    assert loss.requires_grad and torch.isfinite(loss)
    assert "matched with predictions in order" in said[0]


def test_the_solver_is_put_back() -> None:
    before = dict(vars(loss_for_object_detection))
    with match_in_order(build()):
        assert vars(loss_for_object_detection) != before
    assert vars(loss_for_object_detection) == before
    assert "to" not in vars(loss_for_object_detection.ImageLoss)


def test_models_without_boxes_are_left_alone() -> None:
    before = dict(vars(loss_for_object_detection))
    with match_in_order(torch.nn.Linear(2, 2)) as said:
        assert said == [] and vars(loss_for_object_detection) == before


def test_detection_is_traced_and_the_stand_in_is_said() -> None:
    workload, strategy = plan_case(Case("", "yolos", "YolosForObjectDetection"))
    estimate = trace(workload, strategy, build)
    assert estimate.peak_allocated_bytes > 0
    assert any("matched with predictions in order" in note for note in estimate.notes)

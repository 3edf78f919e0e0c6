from __future__ import annotations

from typing import Any

import pytest
from planner_toys import make_job, make_plan, toy_answerer

from brim.errors import Inexpressible, UnknownName
from brim.planner.candidates import list_variants
from brim.planner.target import trainer_for_target


@pytest.mark.parametrize(
    ("target", "trainer"),
    [("deepspeed", "transformers"), ("transformers", "transformers"), ("accelerate", "accelerate"),
     ("unsloth", "unsloth"), ("trl", "trl"), ("TRL", "trl")],
)  # fmt: skip
def test_a_target_sets_the_trainer(target: str, trainer: str) -> None:
    assert trainer_for_target(target) == trainer
    job = make_job(target=target)
    assert job.workload.recipe.engine.name == trainer
    assert f"trainer {trainer}, for the export to {target}" in job.assumptions


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UnknownName):
        make_job(target="megatron")


def kinds(**options: Any) -> set[str]:
    job = make_job(**options)
    return {variant.knobs["activation_checkpointing"] for variant in list_variants(job.workload, job.fixed)}


def test_candidates_without_a_word_are_pruned() -> None:
    assert kinds(trainer="accelerate") == kinds(target="accelerate") == {"none", "selective", "full"}
    assert kinds(target="deepspeed") == {"none", "full"}
    assert kinds(trainer="accelerate", target="deepspeed") == {"none", "full"}


def test_pruning_is_said() -> None:
    plan = make_plan(toy_answerer(), trainer="accelerate", target="deepspeed")
    assert "activation_checkpointing none or full: all that the export target can express" in plan.reasons


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target": "deepspeed", "trainer": "trl"},
         "deepspeed cannot express the chunked loss; use --trainer transformers instead of trl"),
        ({"target": "deepspeed", "activation_checkpointing": "selective"},
         "deepspeed cannot express selective activation checkpointing; use none or full"),
        ({"target": "trl", "optimizer": "muon"},
         "trl cannot express optimizer muon; choose another, for example adamw"),
    ],
)  # fmt: skip
def test_what_it_cannot_say_is_refused_before_planning(options: dict[str, Any], text: str) -> None:
    with pytest.raises(Inexpressible) as refused:
        make_job(**options)
    assert str(refused.value) == text


def test_a_kernel_with_a_name_is_taken() -> None:
    assert make_job(target="trl", optimizer="sgd").fixed["optimizer_kernel"] == "foreach"

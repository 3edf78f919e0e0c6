"""Trainers on two ranks over gloo: replicated and sharded, stock and under brim."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import transformers
from two_ranks import run_both, run_checks

from brim.checks import diagnose, trainers
from brim.checks.accumulation import Split, Subject, verify_accumulation
from brim.checks.gradients import CaptureOptimizer
from brim.checks.lightning_loop import deal
from brim.checks.sequences import collate, make_rows
from brim.checks.subjects import build_model, build_subject
from brim.errors import InvalidInput
from brim.runtime.forms import find_exact_form
from brim.runtime.guard import guard

FEW = [Split(micro_batch_size=1, accumulation_steps=4)]
TRUST = 2e-6
KINDS: set[str] = set()
"""Kinds of parameters whose gradients the optimizers of this rank were given."""


def subject_of(loop: str, sharding: str, architecture: str = "LlamaForCausalLM", *, exact: bool = True) -> Subject:
    config = getattr(transformers, architecture).config_class().to_dict() | {"output_router_logits": True}
    exactly = find_exact_form(loop) if exact else None
    return build_subject(config, architecture, loop, exactly=exactly, num_ranks=2, sharding=sharding)


def check_exact(loop: str, sharding: str, architecture: str = "LlamaForCausalLM") -> None:
    KINDS.clear()
    report = verify_accumulation(subject_of(loop, sharding, architecture), FEW)
    assert report.exact and report.worst.error < TRUST, report.causes
    assert {"DTensor" if sharding == "fsdp2" else "Parameter"} == KINDS
    assert report.subject.endswith(f"on 2 ranks ({sharding})")


def check_trainers(rank: int) -> None:
    check_exact("hf", "ddp")
    check_exact("hf", "fsdp2", "MixtralForCausalLM")
    check_exact("accelerate", "ddp")
    check_exact("accelerate", "fsdp2", "MixtralForCausalLM")


def check_head(rank: int) -> None:
    """TRL reads the weight of a head that is sharded by itself, and leaves its gradient unreduced."""
    if find_spec("trl") is None:
        return
    check_exact("sft", "fsdp2", "LlavaForConditionalGeneration")


def check_lightning(rank: int) -> None:
    if find_spec("lightning") is None:
        return
    for sharding in ("ddp", "fsdp2"):
        check_exact("lightning", sharding)
    with pytest.raises(InvalidInput, match="auxiliary losses under FSDP2"):
        verify_accumulation(subject_of("lightning", "fsdp2", "MixtralForCausalLM"), FEW)


def check_stock(rank: int) -> None:
    """As installed, Accelerate's loop is off where it shards too, and the cause has a name."""
    report = verify_accumulation(subject_of("accelerate", "fsdp2", exact=False), FEW)
    assert any(diagnose.MEAN_OF_MEANS in cause for cause in report.causes), report.causes


def check_own_arguments(rank: int) -> None:
    """A trainer that says fsdp is sharded on the CPU too, where Accelerate alone would replicate."""

    def make() -> Any:
        model = build_model(transformers.LlamaConfig().to_dict(), "LlamaForCausalLM")
        arguments = transformers.TrainingArguments(
            "out", report_to=[], use_cpu=True, remove_unused_columns=False, fsdp=True, fsdp_config={"version": 2}
        )
        rows = make_rows("LlamaForCausalLM", model.config, 40)
        return transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)

    KINDS.clear()
    subject = trainers.read_trainer(make, prepare=guard, num_ranks=2)
    assert subject.name.endswith("(fsdp2)")
    subject.run(FEW[0])
    assert {"DTensor"} == KINDS


def check_dealing(rank: int) -> None:
    assert deal(12, 4, 2) == [[[0, 1, 2, 3], [8, 9, 10, 11]], [[4, 5, 6, 7], [0, 1, 2, 3]]][rank]
    assert deal(12, 1, 2) == [[row] for row in range(rank, 12, 2)]


STEP = CaptureOptimizer.step


def noting(optimizer: CaptureOptimizer, closure: Any = None) -> Any:
    """Step as ever, and note of what kind the parameters are that were trained."""
    found = STEP(optimizer, closure)
    KINDS.update(type(parameter).__name__ for group in optimizer.param_groups for parameter in group["params"])
    return found


CHECKS: tuple[Callable[[int], None], ...] = (
    check_trainers, check_head, check_lightning, check_stock, check_own_arguments, check_dealing,
)  # fmt: skip


def run_rank(rank: int, port: int) -> None:
    CaptureOptimizer.step = noting  # type: ignore[method-assign]
    run_checks(
        rank, port, CHECKS, LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="test", CI="1", OMP_NUM_THREADS="1",
    )  # fmt: skip


def test_trainers_on_two_ranks() -> None:
    run_both(run_rank, most_seconds=200)

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import brim
import brim.api
from brim.errors import DoesNotFit, InvalidFile, InvalidInput, InvalidStrategy, UnknownName
from brim.readers.sources import read_model

PUBLIC = [
    "AccumulationReport", "BrimError", "CannotRecover", "DoesNotFit", "Estimate", "ExactAccumulation", "Export",
    "LightningExact", "ModelShape", "NeutralityReport", "Plan", "Recovery", "Strategy", "Trial", "Workload",
    "__version__", "accumulate", "accumulate_contrastive", "estimate", "exact_accelerate", "export", "guard",
    "load_plan", "load_run", "plan", "read_model", "save_plan", "schema", "trace", "trial", "unguard",
    "verify_accumulation", "verify_neutrality", "watch",
]  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> brim.Plan:
    return brim.plan("meta-llama/Llama-3.1-8B", gpu="rtx-4090", method="qlora", dataset_size=52_000)


def test_the_public_names_all_exist() -> None:
    assert sorted(brim.__all__) == PUBLIC
    assert all(getattr(brim, name) is not None for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(brim))
    with pytest.raises(AttributeError, match="module 'brim' has no attribute 'plam'"):
        _ = brim.plam


def test_the_main_job(plan: brim.Plan) -> None:
    strategy = plan.strategy
    assert strategy.micro_batch_size * strategy.gradient_accumulation_steps == plan.effective_batch_size == 32
    assert plan.estimate.source == "formula"
    assert plan.estimate.peak_allocated_bytes <= plan.budget_bytes < plan.capacity_bytes
    assert plan.estimate.step_time is not None and plan.schedule.total_steps == 1625
    assert plan.brim_version == brim.__version__
    assert plan.assumptions[0] == "model meta-llama/Llama-3.1-8B, a built-in card"
    assert plan.assumptions[1].startswith("gpu rtx-4090")
    assert plan == brim.plan("meta-llama/Llama-3.1-8B", gpu="rtx-4090", method="qlora", dataset_size=52_000)


def test_a_bare_size_on_bare_memory() -> None:
    plan = brim.plan("7B", gpu="24GiB", method="qlora")
    assert plan.estimate.step_time is None
    assert "7B stands for" in plan.assumptions[0]


def test_a_shape_already_read_plans_alike(plan: brim.Plan) -> None:
    shape, _ = read_model("meta-llama/Llama-3.1-8B")
    again = brim.plan(shape, gpu="rtx-4090", method="qlora", dataset_size=52_000)
    assert again.strategy == plan.strategy and again.estimate == plan.estimate


@pytest.mark.parametrize("by", ["rule", "formula"])
def test_replicas_on_several_devices_share_the_batch(by: str) -> None:
    plan = brim.plan("7B", gpu="h100:8", by=by, method="lora")
    assert plan.strategy.mesh.dp_replicate == plan.strategy.mesh.num_devices == 8
    assert plan.strategy.micro_batch_size * plan.strategy.gradient_accumulation_steps * 8 == 32
    assert plan.estimate.source == by


def test_what_the_user_fixes_stays_fixed() -> None:
    plan = brim.plan(
        "7B", gpu="a100", micro_batch_size=2, gradient_accumulation_steps=9, activation_checkpointing="full",
        optimizer="adamw_torch",
    )  # fmt: skip
    strategy = plan.strategy
    assert (strategy.micro_batch_size, strategy.gradient_accumulation_steps, plan.effective_batch_size) == (2, 9, 18)
    assert (strategy.activation_checkpointing, strategy.optimizer_kernel) == ("full", "foreach")


def test_the_record_survives_the_file(plan: brim.Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    brim.save_plan(plan, path)
    assert brim.load_plan(path) == plan
    jsonschema.Draft202012Validator(brim.schema("plan")).validate(json.loads(path.read_text()))
    assert os.listdir(tmp_path) == ["plan.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_is_written_whole_or_not_at_all(plan: brim.Plan, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "plan.json"
    path.write_text("before")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InvalidFile, match="cannot be written: No space left on device"):
        brim.save_plan(plan, path)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["plan.json"]


def test_a_link_is_followed(plan: brim.Plan, tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "plan.json")
    brim.save_plan(plan, tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and brim.load_plan(tmp_path / "plan.json") == plan


def test_a_pipe_is_written_to_and_stays_a_pipe(plan: brim.Plan, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True) as reader:
        brim.save_plan(plan, pipe)
        assert json.loads(reader.communicate(timeout=20)[0])["schema_version"] == 1
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("name", "problem"),
    [("missing/plan.json", "cannot be written: No such file or directory"), (".", "cannot be written: is a folder")],
)
def test_an_unwritable_path_is_one_line(plan: brim.Plan, tmp_path: Path, name: str, problem: str) -> None:
    with pytest.raises(InvalidFile) as refused:
        brim.save_plan(plan, tmp_path / name)
    assert str(refused.value).endswith(problem)


def test_unreadable_plans_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match="cannot be read: No such file or directory"):
        brim.load_plan(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidFile, match="cannot be read: not UTF-8 text"):
        brim.load_plan(tmp_path / "bytes.json")
    (tmp_path / "huge.json").write_bytes(b" " * 50_000_001)
    with pytest.raises(InvalidFile, match="is larger than 50,000,000 bytes; no plan is"):
        brim.load_plan(tmp_path / "huge.json")
    with pytest.raises(InvalidFile):
        brim.load_plan("nul\0byte")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_a_regular_file_is_read_as_a_plan(tmp_path: Path, kind: str) -> None:
    path = {"pipe": tmp_path / "pipe", "device": Path("/dev/zero"), "folder": tmp_path}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(InvalidFile, match="is no regular file"):
        brim.load_plan(path)


@pytest.mark.parametrize(("place", "said"), [
    (("recipe", "optimizer"), "unknown optimizer 'adamx'; did you mean adamw"),
    (("recipe", "engine", "name"), "unknown trainer 'adamx'"),
    (("task",), "unknown task 'adamx'; known: chat"),
    (("cluster", "device", "link"), "unknown link 'adamx'"),
])  # fmt: skip
def test_names_of_an_edited_plan_are_checked(
    plan: brim.Plan, tmp_path: Path, place: tuple[str, ...], said: str
) -> None:
    document = brim.api.describe_plan(plan)
    inside = document["workload"]
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = "adamx"
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InvalidFile) as refused:
        brim.load_plan(path)
    assert said in str(refused.value) and str(path)[:20] in str(refused.value)


def test_rows_of_a_dataset_file_are_its_sequences(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "x"}\n' * 5000)
    job = {"gpu": "rtx-4090", "method": "qlora", "dataset": str(path)}
    plan = brim.plan("8B", **job)
    assert plan.workload.data.num_sequences == 5000 and plan.schedule.steps_per_epoch == 157
    assert any(said.startswith("5,000 rows in ") for said in plan.assumptions)
    assert brim.plan("8B", **job, dataset_size=64).workload.data.num_sequences == 64
    packed = brim.plan("8B", **job, packing=True)
    assert packed.workload.data.num_sequences is None
    assert any("packed rows are no sequences" in said for said in packed.assumptions)
    for size in (None, 64):
        with pytest.raises(InvalidFile, match="dataset cannot be read"):
            brim.plan("8B", gpu="rtx-4090", dataset=str(tmp_path / "none.jsonl"), dataset_size=size)


def test_an_export_for_an_older_release() -> None:
    plan = brim.plan("8B", gpu="rtx-4090", method="qlora", trainer="transformers")
    older = brim.export(plan, "trl", version="0.12")
    assert "max_seq_length" in older.keywords and "max_length" not in older.keywords
    with pytest.raises(UnknownName, match="unknown trl version 'x'; known: trl>="):
        brim.export(plan, "trl", version="x")


def test_estimates_stand_side_by_side() -> None:
    rule, formula = brim.estimate(
        "7B", gpu="24GiB", method="qlora", micro_batch_size=4, gradient_accumulation_steps=8, by=("rule", "formula")
    )
    assert (rule.source, formula.source) == ("rule", "formula")
    assert rule.peak_allocated_bytes > 0 and len(formula.moments) > 1


def test_an_estimate_stands_as_the_trainer_has_it() -> None:
    trl, transformers = (
        brim.estimate("7B", gpu="24GiB", method="lora", trainer=trainer)[0] for trainer in ("trl", "transformers")
    )
    full = brim.estimate("7B", gpu="24GiB", method="lora", trainer="trl", activation_checkpointing="full")[0]
    assert trl == full
    assert transformers.peak_allocated_bytes > trl.peak_allocated_bytes


def test_an_estimate_equals_the_plans(plan: brim.Plan) -> None:
    (estimate,) = brim.estimate(
        "meta-llama/Llama-3.1-8B", gpu="rtx-4090", method="qlora", dataset_size=52_000, effective_batch_size=32,
        micro_batch_size=plan.strategy.micro_batch_size,
        activation_checkpointing=plan.strategy.activation_checkpointing,
    )  # fmt: skip
    assert estimate == plan.estimate


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: brim.plan("7B", gpu="24GiB", by="guess"), UnknownName, "unknown by 'guess'; known: formula, rule"),
        (lambda: brim.estimate("7B", gpu="24GiB", by=("guess",)), UnknownName,
         "unknown answerer 'guess'; known: formula, rule"),
        (lambda: brim.estimate("7B", gpu="24GiB", by="rule"), InvalidInput,
         "by must be a list of answerers such as ('rule', 'formula'), not 'rule'"),
        (lambda: brim.plan("", gpu="24GiB"), InvalidInput,
         "model must be a hub id, a folder, a config.json or a size such as 7B, not ''"),
        (lambda: brim.plan("7B", gpu="24GiB", batch=3), UnknownName, "unknown option 'batch'"),
        (lambda: brim.plan("7B", gpu="t4", dtype="bf16"), InvalidStrategy,
         "bf16 needs compute capability 8.0, t4 has 7.5; use dtype fp16"),
        (lambda: brim.estimate("7B", gpu="t4", dtype="bf16"), InvalidStrategy,
         "bf16 needs compute capability 8.0, t4 has 7.5; use dtype fp16"),
        (lambda: brim.export(None, "nope"), UnknownName, "unknown target 'nope'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as refused:
        call()
    assert str(refused.value).startswith(text) and "\n" not in str(refused.value)


def test_nothing_fits_and_what_it_would_take() -> None:
    with pytest.raises(DoesNotFit) as refused:
        brim.plan("8B", gpu="rtx-4090", method="full")
    changes = [relaxation.change for relaxation in refused.value.relaxations]
    assert "--method lora" in changes and any(change.startswith("--gpu ") for change in changes)


def test_an_export_comes_from_a_plan(plan: brim.Plan) -> None:
    export = brim.export(plan, "trl")
    assert export.keywords["per_device_train_batch_size"] == plan.strategy.micro_batch_size
    assert isinstance(export, brim.Export)


LIGHT = """
import sys, brim
assert not [name for name in sys.modules if name.startswith("brim.")], "import brim imports no room"
brim.plan("8B", gpu="rtx-4090", method="qlora")
heavy = {"torch", "transformers", "trl", "datasets", "pydantic", "typer", "rich", "huggingface_hub", "numpy"}
print(sorted(heavy & set(sys.modules)))
"""


def test_planning_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("subject", ["train.py:make_trainer", lambda: None])
def test_a_sharding_does_not_go_with_a_trainer_of_ones_own(subject: object) -> None:
    with pytest.raises(InvalidInput, match="a trainer of your own says fsdp=True"):
        brim.verify_accumulation(subject, sharding="fsdp2")  # type: ignore[arg-type]

"""What each verb prints and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from brim.cli.app import VERBS

Run = Callable[..., Any]


def join_lines(text: str) -> str:
    """Return the words of a text; commands that were broken behind a backslash are whole again."""
    return " ".join(text.replace("\\\n", " ").split())


def test_plan_prints_the_verdict_first_and_writes_nothing(
    brim: Run, job: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = brim("plan", *job)
    assert done.code == 0 and done.err == ""
    assert done.out.startswith("Fits: micro-batch ")
    assert "= 32 sequences per optimizer step\n" in done.out
    assert done.out.rstrip().endswith("brim plan 8B --gpu rtx-4090 --method qlora --export trl")
    assert not any(line != line.rstrip() for line in done.out.splitlines())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["plan", "estimate"])
def test_json_keeps_its_schema(brim: Run, job: tuple[str, ...], verb: str) -> None:
    document, schema = brim(verb, *job, "--json"), brim("schema", verb)
    assert document.code == schema.code == 0
    jsonschema.Draft202012Validator.check_schema(schema.json)
    jsonschema.validate(document.json, schema.json)


def test_a_saved_plan_is_shown_as_it_was_printed(brim: Run, job: tuple[str, ...], tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    printed = brim("plan", *job, "--out", path)
    assert printed.err == f"wrote {path}: the plan\n"
    shown = brim("show", path)
    assert shown.code == 0
    assert shown.out == printed.out
    assert join_lines(shown.out).endswith(f"brim export {path} trl")
    assert brim("show", path, "--json").json == json.loads(Path(path).read_text())


def test_plan_and_export_write_the_same_files(brim: Run, job: tuple[str, ...], tmp_path: Path) -> None:
    path, first, second = str(tmp_path / "plan.json"), tmp_path / "first", tmp_path / "second"
    planned = brim("plan", *job, "--out", path, "--export", "trl", "--export-dir", str(first))
    exported = brim("export", path, "trl", "--export-dir", str(second))
    assert planned.code == exported.code == 0
    files = sorted(file.name for file in first.iterdir())
    assert files and files == sorted(file.name for file in second.iterdir())
    assert all((first / name).read_text() == (second / name).read_text() for name in files)
    assert all(f"wrote {first / name}\n" in planned.err for name in files)
    assert f"cd {first} && " in join_lines(planned.out) and f"cd {second} && " in join_lines(exported.out)


def test_an_older_release_can_be_written_for(brim: Run, job: tuple[str, ...], tmp_path: Path) -> None:
    """TRL before 1.4 has no chunked loss: the plan is one that it has words for."""
    path, first, second = str(tmp_path / "plan.json"), tmp_path / "first", tmp_path / "second"
    words = ["--export", "trl", "--for-version", "0.20"]
    planned = brim("plan", *job, "--out", path, *words, "--export-dir", str(first))
    exported = brim("export", path, "trl", "--for-version", "0.20", "--export-dir", str(second))
    assert planned.code == exported.code == 0
    assert "for trl>=0.19,<0.22" in exported.out
    assert (first / "train.py").read_text() == (second / "train.py").read_text()
    assert "note: planned for trainer transformers: " in planned.err
    kept = brim("plan", *job, *words, "--trainer", "trl", "--export-dir", str(first))
    assert kept.code == 2 and "cannot express the chunked loss" in kept.err


def test_a_plan_is_made_for_its_target(brim: Run, job: tuple[str, ...], tmp_path: Path) -> None:
    for target in ("transformers", "unsloth", "accelerate", "deepspeed"):
        done = brim("plan", *job, "--export", target, "--export-dir", str(tmp_path / target))
        assert done.code == 0, done.err


def test_words_are_folded(brim: Run, job: tuple[str, ...]) -> None:
    asked, dashed = (brim("plan", *job, "--task", task) for task in ("Instruction  tuning", "instruction-tuning"))
    assert asked.code == 0 and asked.out.split("brim plan")[0] == dashed.out.split("brim plan")[0]


def test_export_prints_json(brim: Run, job: tuple[str, ...], tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    plan = brim("plan", *job, "--json", "--out", path).json
    done = brim("export", path, "trl", "--export-dir", str(tmp_path), "--json")
    settings = done.json["settings"]
    assert settings["per_device_train_batch_size"] == plan["strategy"]["micro_batch_size"]
    assert settings["gradient_accumulation_steps"] == plan["strategy"]["gradient_accumulation_steps"]


def test_estimate_puts_answers_side_by_side(brim: Run, job: tuple[str, ...]) -> None:
    done = brim("estimate", *job, "--micro-batch-size", "2", "--by", "rule,formula")
    assert done.code == 0
    assert "8B, micro-batch 2\n" in done.out and "rule vs formula" in done.out
    both = brim("estimate", *job, "--by", "rule, formula", "--json").json["estimates"]
    assert [row["source"] for row in both] == ["rule", "formula"]


@pytest.mark.parametrize(("verb", "key", "text"), [
    ("gpus", "gpus", "rtx-4090"), ("models", "models", "Llama-3.1-8B"), ("tasks", "tasks", "chat"),
    ("optimizers", "optimizers", "adamw"),
])  # fmt: skip
def test_listings(brim: Run, verb: str, key: str, text: str) -> None:
    assert text in brim(verb).out
    rows = brim(verb, "--json").json[key]
    assert all(row["source"] for row in rows)
    few = brim(verb, text.upper().replace("-", "_"), "--json").json[key]
    assert 0 < len(few) < len(rows)
    assert brim(verb, "no-such-row").code == 2


def test_env_names_versions_and_no_secret(brim: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/home/somebody/private")
    done = brim("env")
    assert done.code == 0
    assert "hf_secret" not in done.out and "somebody" not in done.out
    facts = brim("env", "--json").json
    assert facts["HF_TOKEN"] == facts["HF_HOME"] == "set" and facts["HF_HUB_OFFLINE"] == "1"
    assert {"python", "brim", "torch", "gpu"} <= set(facts)


def test_help_is_what_no_words_print(brim: Run) -> None:
    nothing, asked = brim(), brim("-h")
    assert nothing.code == asked.code == 0
    assert nothing.out == asked.out
    assert all(f"\n  {verb} " in asked.out for verb in VERBS)
    assert "Examples:" in asked.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(brim: Run, verb: str) -> None:
    done = brim(verb, "-h")
    assert done.code == 0 and done.err == ""
    assert "Example" in done.out and f"brim {verb}" in done.out
    assert max(map(len, done.out.splitlines())) <= 100
    assert not [line for line in done.out.splitlines() if line.startswith("  --") and len(line.split()) == 1 and
                "--refresh" in line]  # fmt: skip


def test_plan_help_takes_its_words_from_the_options(brim: Run) -> None:
    text = " ".join(brim("plan", "-h").out.split())
    assert "Sequences one optimizer step averages over." in text
    assert "--[no-]packing" in text
    assert "--per-device-train-batch-size --micro-batch-size" in text


def test_version(brim: Run) -> None:
    from brim import __version__

    assert brim("--version").out == f"brim {__version__}\n"

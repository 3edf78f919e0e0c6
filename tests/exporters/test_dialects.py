"""The words of every dialect, held against the field lists of real releases."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from export_plans import make_plan

from brim.exporters import export_plan
from brim.tables.dialects import find_dialect, list_dialects

FIELDS = json.loads((Path(__file__).parent / "fields.json").read_text(encoding="utf-8"))


def knobs_for(row) -> dict:
    liger = {"layer_kernels": "liger"} if "liger" in row.layer_kernels else {}
    offload = {"activation_offload": True} if row.activation_offload else {}
    loss = list(row.loss_kernels)[-1]
    return {"activation_checkpointing": "full", "loss_kernel": loss, "compile": row.compile, **liger, **offload}


@pytest.mark.parametrize("version", FIELDS["transformers"])
def test_training_arguments_has_every_word(version: str) -> None:
    row = find_dialect("transformers", version)
    for warmup in (5, None):
        plan = make_plan("transformers", warmup_steps=warmup, **knobs_for(row))
        words = export_plan(plan, "transformers", version=version).keywords
        assert set(words) <= set(FIELDS["transformers"][version])


@pytest.mark.parametrize("version", FIELDS["trl"])
def test_sft_config_has_every_word(version: str) -> None:
    row = find_dialect("trl", version)
    known = {*FIELDS["trl"][version], *FIELDS["transformers"][FIELDS["trl_transformers"][version]]}
    for warmup in (5, None):
        plan = make_plan("trl", warmup_steps=warmup, packing=row.packing, **knobs_for(row))
        words = export_plan(plan, "trl", version=version).keywords
        assert set(words) <= known


def test_unsloth_has_every_word() -> None:
    export = export_plan(make_plan("unsloth", method="qlora", activation_offload=True), "unsloth")
    fast, lora = FIELDS["unsloth"].values()
    own = {"num_processes", "peft_config", "quantization_config", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}
    own.add("UNSLOTH_DISABLE_STATISTICS")
    # from_pretrained drops `attn_implementation` itself: the kernel is Unsloth's choice.
    assert set(export.outside) - own - {"attn_implementation"} <= set(fast)
    assert set(export.outside["peft_config"]) <= set(lora)
    assert set(export.keywords) <= {*FIELDS["trl"]["1.15.0"], *FIELDS["transformers"]["5.17.0"]}


def test_installed_release_is_a_frozen_one() -> None:
    """A new release of either library must be looked at, and its list added."""
    transformers = pytest.importorskip("transformers")
    frozen = FIELDS["transformers"].get(transformers.__version__)
    if frozen is None:
        pytest.skip(f"no frozen list for transformers {transformers.__version__}")
    from dataclasses import fields

    assert set(frozen) <= {field.name for field in fields(transformers.TrainingArguments)}


def test_dialects_of_a_target_do_not_overlap() -> None:
    for target in {row.target for row in list_dialects()}:
        rows = [row for row in list_dialects() if row.target == target]
        assert rows[0].until is None
        for newer, older in pairwise(rows):
            assert older.until is not None
            assert find_dialect(target, older.since) == older
            assert tuple(map(int, older.until.split("."))) <= tuple(map(int, newer.since.split(".")))

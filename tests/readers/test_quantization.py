"""Checkpoints that are stored quantised are planned as stored, or refused; never as unquantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import brim
from brim.errors import InvalidConfig, InvalidInput, UnsupportedModel
from brim.readers.quantization import read_quantization
from brim.spec.recipe import Quantization
from brim.tables.read import find_card

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
BNB = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}  # fmt: skip


@pytest.mark.parametrize(("stored", "quantization"), [
    (None, None),
    ({}, None),
    (GPTQ, Quantization(kind="gptq-int4", block_size=128)),
    ({**GPTQ, "group_size": 32}, Quantization(kind="gptq-int4", block_size=32)),
    ({**GPTQ, "group_size": -1}, Quantization(kind="gptq-int4", block_size=2**31)),
    (BNB, Quantization(kind="nf4", double_quant=True)),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, Quantization(kind="fp4")),
    ({"load_in_8bit": True}, Quantization(kind="int8")),
    ({"quant_method": "bitsandbytes", "load_in_4bit": False}, None),
])  # fmt: skip
def test_what_a_config_says(stored: Any, quantization: Quantization | None) -> None:
    assert read_quantization({"quantization_config": stored}, name="m") == quantization


@pytest.mark.parametrize(("stored", "error", "text"), [
    ([1], InvalidConfig, "quantization_config must be an object, not a list"),
    ("gptq", InvalidConfig, "quantization_config must be an object"),
    ({"x": 1}, InvalidConfig, "quantization_config.quant_method is missing"),
    ({**GPTQ, "bits": "4"}, InvalidConfig, "quantization_config.bits must be a whole number"),
    ({**GPTQ, "group_size": 0}, InvalidConfig, "quantization_config.group_size must be"),
    ({**BNB, "bnb_4bit_quant_type": "zz"}, InvalidConfig, "must be nf4 or fp4"),
    ({**GPTQ, "bits": 8}, UnsupportedModel, "8-bit GPTQ weights of 'm'; name the unquantised checkpoint"),
    *[({"quant_method": method}, UnsupportedModel, f"stored as {method} of 'm'; name the unquantised checkpoint")
      for method in ("awq", "fp8", "mxfp4", "compressed-tensors")],
])  # fmt: skip
def test_what_is_refused(stored: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as refused:
        read_quantization({"quantization_config": stored}, name="m")
    assert text in str(refused.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Any:
    """Return a function that writes an 8B checkpoint's config and returns its folder."""

    def write(stored: Any) -> str:
        card = find_card("8B")
        assert card is not None
        (tmp_path / "config.json").write_text(json.dumps({**card.config, "quantization_config": stored}))
        return str(tmp_path)

    return write


def test_a_gptq_checkpoint_is_planned_as_stored(checkpoint: Any, tmp_path: Path) -> None:
    plan = brim.plan(checkpoint(GPTQ), gpu="rtx-4090")
    assert plan.workload.recipe.method == "qlora"
    stored = plan.workload.recipe.quantization
    assert stored is not None and (stored.kind, stored.block_size, stored.double_quant) == ("gptq-int4", 128, False)
    assert "method qlora, since the checkpoint is quantised" in plan.assumptions
    assert "base weights in gptq-int4 in groups of 128, as the checkpoint stores them" in plan.assumptions
    assert not any("nf4" in said or "quantised once more" in said for said in plan.assumptions)
    brim.save_plan(plan, tmp_path / "plan.json")
    assert brim.load_plan(tmp_path / "plan.json") == plan


def test_a_bitsandbytes_checkpoint_plans_as_the_same_storage_would(checkpoint: Any) -> None:
    stored = brim.plan(checkpoint(BNB), gpu="rtx-4090")
    asked = brim.plan("8B", gpu="rtx-4090", method="qlora")
    assert stored.workload.recipe == asked.workload.recipe and stored.estimate == asked.estimate


@pytest.mark.parametrize("options", [
    {"method": "full"}, {"method": "lora"}, {"quantization": "nf4"}, {"double_quant": True},
])  # fmt: skip
def test_what_cannot_be_done_with_it_is_one_error(checkpoint: Any, options: dict[str, Any]) -> None:
    folder = checkpoint(GPTQ)
    with pytest.raises(InvalidInput, match="is stored in gptq-int4") as refused:
        brim.plan(folder, gpu="rtx-4090", **options)
    assert str(refused.value).endswith("name the unquantised checkpoint instead")


def test_other_formats_are_refused_before_anything_is_planned(checkpoint: Any) -> None:
    folder = checkpoint({"quant_method": "awq", "bits": 4})
    for verb in (brim.plan, brim.estimate):
        with pytest.raises(UnsupportedModel, match="weights stored as awq"):
            verb(folder, gpu="rtx-4090")

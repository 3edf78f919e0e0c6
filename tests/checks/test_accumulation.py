"""Loops as installed and made exact: what the proof says of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

import brim
from brim.checks import diagnose
from brim.checks.accumulation import Split, list_splits, verify_accumulation
from brim.checks.report import AccumulationReport, is_exact, without_numbers
from brim.checks.subjects import build_model, build_subject
from brim.checks.trainers import name_fix
from brim.errors import InvalidInput, ProbeFailed, UnknownName
from brim.runtime.accelerate_loop import exact_accelerate
from brim.runtime.accumulate import accumulate
from brim.runtime.guard import guard

FEW = [Split(micro_batch_size=4, accumulation_steps=2), Split(micro_batch_size=1, accumulation_steps=8)]


def report_of(architecture: str, loop: str, exactly: Any = None, **changes: Any) -> AccumulationReport:
    config = {**getattr(transformers, architecture).config_class().to_dict(), **changes}
    return verify_accumulation(build_subject(config, architecture, loop, exactly=exactly), FEW)


@pytest.mark.parametrize(("architecture", "loop", "exactly", "cause"), [
    ("LlamaForCausalLM", "hf", guard, ""),
    ("T5ForConditionalGeneration", "hf", guard, diagnose.NOT_DIVIDED),
    ("BertForMaskedLM", "hf", guard, diagnose.NOT_DIVIDED),
    ("BertForTokenClassification", "hf", guard, diagnose.NOT_DIVIDED),
    ("LlamaForSequenceClassification", "hf", guard, diagnose.NOT_DIVIDED),
    ("GPT2LMHeadModel", "hf", guard, diagnose.WRONG_COUNT),
    ("MixtralForCausalLM", "hf", guard, diagnose.AUXILIARY),
    ("LlamaForCausalLM", "plain", accumulate, diagnose.MEAN_OF_MEANS),
    ("LlamaForCausalLM", "accelerate", exact_accelerate, diagnose.MEAN_OF_MEANS),
])  # fmt: skip
def test_stock_and_exact(architecture: str, loop: str, exactly: Any, cause: str) -> None:
    changes = {"output_router_logits": True} if architecture.startswith("Mixtral") else {}
    stock = report_of(architecture, loop, **changes)
    assert any(cause in found for found in stock.causes) if cause else stock.exact
    ours = report_of(architecture, loop, exactly, **changes)
    assert ours.exact, ours.causes
    assert ours.worst.error < 2e-6
    assert ours.loss == stock.loss


def test_lightning() -> None:
    pytest.importorskip("lightning")
    assert any(diagnose.MEAN_OF_MEANS in cause for cause in report_of("LlamaForCausalLM", "lightning").causes)
    assert report_of("LlamaForCausalLM", "lightning", brim.LightningExact).exact
    # a recurrent layer keeps the state of its last forward pass, which is copied without its graph
    assert report_of("RecurrentGemmaForCausalLM", "lightning", brim.LightningExact).exact


@pytest.mark.parametrize("loop", ["sft", "dpo"])
def test_trl(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("CI", "1")
    assert report_of("LlamaForCausalLM", loop, guard).exact


def test_padding_is_told_from_accumulation() -> None:
    report = report_of("BertForQuestionAnswering", "hf", guard)
    assert not report.exact
    assert set(report.causes) == {diagnose.PADDING}
    assert report.padding_error > 1e-2
    assert report.fix.startswith("batches of equally long sequences")


def test_a_report_survives_its_document() -> None:
    report = report_of("LlamaForCausalLM", "plain")
    document = report.describe()
    assert document["exact"] is False
    assert AccumulationReport.read(document) == report


def test_the_fix_is_one_that_the_release_allows() -> None:
    assert name_fix("5.24.0") == name_fix("4.46.0") == "trainer = brim.guard(trainer)"
    assert name_fix("4.45.2").startswith("transformers 4.45.2 cannot be guarded: with 4.46 or later")


def test_splits_of_a_window() -> None:
    assert [(s.micro_batch_size, s.accumulation_steps) for s in list_splits(1)] == [(8, 1), (4, 2), (2, 4), (1, 8)]
    assert [(s.micro_batch_size, s.accumulation_steps) for s in list_splits(4)] == [(2, 1), (1, 2)]
    with pytest.raises(InvalidInput, match="3 ranks"):
        list_splits(3)


def test_limits_in_sixteen_bit_are_sharp_in_the_norm_and_wide_in_the_difference() -> None:
    assert is_exact(2e-2, 1.001, 1 - 1e-4, "bf16")
    assert not is_exact(2e-2, 0.98, 1.0, "bf16")  # GPT-2's count
    assert not is_exact(2e-2, 1.0, 1 - 1e-3, "bf16")
    assert not is_exact(2e-5, 1.0, 1.0, "fp32")


def test_names_without_their_numbers() -> None:
    assert without_numbers(f"{diagnose.NOT_DIVIDED} (gradient x 4), and more") == f"{diagnose.NOT_DIVIDED}, and more"


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean hf"):
        build_subject({}, "LlamaForCausalLM", "hff")
    with pytest.raises(UnknownName, match="did you mean fsdp2"):
        build_subject({}, "LlamaForCausalLM", "hf", sharding="fsdp")
    with pytest.raises(ProbeFailed, match="NoSuchModel"):
        build_model({}, "NoSuchModel")


def test_a_class_without_a_head_gets_the_one_it_is_pretrained_with() -> None:
    model = build_model(transformers.BertConfig().to_dict(), "BertModel")
    assert type(model).__name__ == "BertForMaskedLM"


SCRIPT = """
import torch, transformers
from brim.checks.sequences import collate, make_rows
from brim.checks.subjects import build_model

def make_trainer():
    model = build_model(transformers.T5Config().to_dict(), "T5ForConditionalGeneration")
    rows = make_rows("T5ForConditionalGeneration", model.config, 40)
    arguments = transformers.TrainingArguments("out", report_to=[], use_cpu=True, remove_unused_columns=False)
    return transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)

def make_guarded():
    import brim
    return brim.guard(make_trainer())

def make_nothing():
    return None

def make_trouble():
    raise OSError("no such dataset")
"""


def test_the_users_own_trainer(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    stock = brim.verify_accumulation(f"{script}:make_trainer")
    assert diagnose.NOT_DIVIDED in stock.causes[0]
    assert stock.fix == "trainer = brim.guard(trainer)"
    guarded = brim.verify_accumulation(f"{script}:make_trainer", guarded=True)
    assert (guarded.exact, guarded.fix) == (True, "")
    assert brim.verify_accumulation(f"{script}:make_guarded").exact
    with pytest.raises(InvalidInput, match=r"must return a transformers\.Trainer, not NoneType"):
        brim.verify_accumulation(f"{script}:make_nothing")
    with pytest.raises(InvalidInput, match=r"make_trouble fails: OSError: no such dataset"):
        brim.verify_accumulation(f"{script}:make_trouble")
    with pytest.raises(UnknownName, match="make_trainer"):
        brim.verify_accumulation(f"{script}:make_trainr")


def test_two_ranks_of_a_plain_loop_sharded() -> None:
    report = brim.verify_accumulation(
        "meta-llama/Llama-3.2-1B", trainer="plain", ranks=2, sharding="fsdp2", guarded=True
    )
    assert report.exact
    assert {split.num_ranks for split in report.splits} == {2}


def test_two_ranks_of_the_hf_trainer(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    stock = brim.verify_accumulation(f"{script}:make_trainer", ranks=2)
    assert any(diagnose.RANK_FACTOR in cause for cause in stock.causes)
    assert brim.verify_accumulation(f"{script}:make_guarded", ranks=2).exact


BF16 = """
import torch, transformers
from brim.checks.sequences import collate, make_rows

def make_trainer():
    torch.manual_seed(0)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=128, n_layer=2, n_head=4, **off)
    rows = make_rows("GPT2LMHeadModel", config, 40)
    said = dict(report_to=[], use_cpu=True, remove_unused_columns=False, bf16=True)
    model, arguments = transformers.GPT2LMHeadModel(config), transformers.TrainingArguments("out", **said)
    return transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)
"""


@pytest.mark.parametrize("guarded", [False, True])
def test_the_real_precision_has_its_own_limits(tmp_path: Path, guarded: bool) -> None:
    """A count that is 2 % off is seen in bf16, where the noise of the difference is 0.5 %.

    The truth is made under the trainer's autocast too: one in fp32 is seven times as far from any exact split.
    """
    (tmp_path / "train.py").write_text(BF16, encoding="utf-8")
    report = brim.verify_accumulation(f"{tmp_path}/train.py:make_trainer", full_size=True, guarded=guarded)
    assert report.precision == "bf16"
    assert report.exact == guarded, report.causes
    assert guarded or diagnose.WRONG_COUNT in report.causes[0]
    assert "own model" in report.size
    assert not guarded or max(1 - split.cosine for split in report.splits) < 1e-4


def test_a_small_copy_is_proved_in_fp32_whatever_the_precision_of_its_trainer(tmp_path: Path) -> None:
    """Limits of fp32 on a run under bf16's autocast would find every trainer inexact, a guarded one too."""
    (tmp_path / "train.py").write_text(BF16, encoding="utf-8")
    report = brim.verify_accumulation(f"{tmp_path}/train.py:make_trainer", guarded=True)
    assert (report.precision, report.exact) == ("fp32", True), report.causes


def test_ranks_need_a_script() -> None:
    with pytest.raises(InvalidInput, match=r"train\.py:make_trainer"):
        brim.verify_accumulation(lambda: None, ranks=2)
    with pytest.raises(InvalidInput, match="1, 2, 4 or 8"):
        brim.verify_accumulation("meta-llama/Llama-3.2-1B", ranks=3)


def test_ranks_that_die_are_told() -> None:
    with pytest.raises(ProbeFailed, match="gave no answer"):
        brim.verify_accumulation("no/such-model", ranks=2)


def test_one_thread_while_it_runs() -> None:
    before = torch.get_num_threads()
    report_of("LlamaForCausalLM", "plain")
    assert torch.get_num_threads() == before

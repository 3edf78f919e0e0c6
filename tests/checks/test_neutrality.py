"""Knobs that change no gradient pass, knobs that do are named, and what a CPU cannot run is said."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import AttentionInterface, BertConfig, LlamaConfig, MambaConfig, MixtralConfig, OPTConfig, T5Config

from brim.checks.knobs import Knob, checkpoint_layers, make_optimizer
from brim.checks.neutrality import TOGETHER, verify_neutrality
from brim.checks.report import KnobResult, NeutralityReport
from brim.checks.sequences import collate, make_rows
from brim.checks.subjects import build_model
from brim.cli.app import main
from brim.errors import InvalidInput, ProbeFailed
from brim.report.neutrality import format_neutrality
from brim.spec.strategy import Mesh, Strategy

CONFIGS: dict[str, Any] = {
    "LlamaForCausalLM": LlamaConfig(num_key_value_heads=8),
    "T5ForConditionalGeneration": T5Config(),
    "BertForMaskedLM": BertConfig(),
    "MambaForCausalLM": MambaConfig(num_hidden_layers=2),
    "OPTForCausalLM": OPTConfig(),
    "MixtralForCausalLM": MixtralConfig(output_router_logits=True, router_aux_loss_coef=0.1),
}


def verify(architecture: str, knobs: Strategy | list[Knob]) -> NeutralityReport:
    model = build_model(CONFIGS[architecture].to_dict(), architecture)
    return verify_neutrality(model, make_rows(architecture, model.config, 8), collate, knobs)


def turn(**knobs: Any) -> Strategy:
    return Strategy(micro_batch_size=1, gradient_accumulation_steps=8, **knobs)


def rows_of(report: NeutralityReport) -> dict[tuple[str, str], KnobResult]:
    return {(row.knob, "" if row.knob == TOGETHER else row.value): row for row in report.knobs}


def test_the_knobs_of_a_llama_are_neutral() -> None:
    pytest.importorskip("trl", minversion="1.15")
    report = verify("LlamaForCausalLM", turn(
        activation_checkpointing="full", loss_kernel="chunked", padding_free=True, activation_offload=True
    ))  # fmt: skip
    rows = rows_of(report)
    assert set(rows) == {
        ("attention_kernel", "sdpa"), ("activation_checkpointing", "full"), ("loss_kernel", "chunked"),
        ("activation_checkpointing", "full, reentrant"), ("optimizer_kernel", "fused"), ("padding_free", "yes"),
        ("activation_offload", "yes"), (TOGETHER, ""),
    }  # fmt: skip
    assert report.neutral and all(row.verdict == "neutral" for row in report.knobs)
    assert all(row.error is not None and row.error < 2e-6 for row in report.knobs)


@pytest.mark.parametrize("architecture", ["T5ForConditionalGeneration", "BertForMaskedLM"])
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_encoders_are_neutral_and_not_joined(architecture: str, checkpointing: Any) -> None:
    kernel: Any = "eager" if "T5" in architecture else "sdpa"
    asked = turn(activation_checkpointing=checkpointing, attention_kernel=kernel, padding_free=True)
    report = verify(architecture, asked)
    assert report.neutral
    row = rows_of(report)["activation_checkpointing", checkpointing]
    assert row.verdict == "neutral", row.reason
    joined = rows_of(report)["padding_free", "yes"]
    assert (joined.verdict, joined.error) == ("not checked", None)
    assert "cannot be concatenated" in joined.reason


def test_joined_sequences_leak_through_a_state() -> None:
    report = verify("MambaForCausalLM", turn(padding_free=True, attention_kernel="eager"))
    row = rows_of(report)["padding_free", "yes"]
    assert not report.neutral and row.verdict == "belongs to the workload"
    assert row.error is not None and row.error > 1e-3
    assert "see each other" in row.reason


def test_joined_sequences_leak_where_no_mask_is_made_of_positions() -> None:
    """transformers 5.24 makes OPT's mask without its positions; flash attention is given them."""
    leaking = rows_of(verify("OPTForCausalLM", turn(padding_free=True)))
    told = rows_of(verify("OPTForCausalLM", turn(padding_free=True, attention_kernel="flash")))
    assert leaking["padding_free", "yes"].verdict == "belongs to the workload"
    assert told["padding_free", "yes"].verdict == "neutral", told["padding_free", "yes"].reason
    assert told["attention_kernel", "flash"].verdict == "not checked"


def test_reentrant_checkpointing_loses_the_router_loss() -> None:
    rows = rows_of(verify("MixtralForCausalLM", turn(activation_checkpointing="full")))
    row = rows["activation_checkpointing", "full"]
    assert row.verdict == "neutral", row.reason
    assert rows["activation_checkpointing", "full, reentrant"].verdict == "belongs to the workload"
    assert rows[TOGETHER, ""].verdict == "neutral", rows[TOGETHER, ""].reason


def test_what_needs_a_gpu_is_not_checked() -> None:
    report = verify("LlamaForCausalLM", turn(
        attention_kernel="flash", loss_kernel="fused", layer_kernels="liger", allocator="expandable_segments",
        offload="parameters", mesh=Mesh(tp=2), optimizer_kernel="loop",
    ))  # fmt: skip
    assert {row.verdict for row in report.knobs} == {"not checked"}
    assert [row.knob for row in report.knobs] == [
        "attention_kernel", "loss_kernel", "layer_kernels", "offload", "allocator", "mesh.tp"
    ]  # fmt: skip
    assert all(row.reason and row.error is None for row in report.knobs)


def blind(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
    weights = torch.softmax(query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scaling, -1)
    return (weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)).transpose(1, 2), None


def use_blind(model: Any) -> Any:
    AttentionInterface.register("blind", blind)
    model.config._attn_implementation = "blind"
    return model


def fail(model: Any) -> Any:
    raise RuntimeError("no compiler\nhere")


def halve(model: Any, inputs: Any) -> Any:
    return model(**inputs).loss / 2


DROPS_RNG = {"use_reentrant": False, "preserve_rng_state": False}
PLANTED = {
    "attention that ignores the mask": Knob(name="attention_kernel", value="blind", prepare=use_blind),
    "recomputation that drops the RNG": checkpoint_layers("full", DROPS_RNG),
    "a loss of another scale": Knob(name="loss_kernel", value="half", loss_of=halve),
    "an optimizer that decays differently": Knob(
        name="optimizer_kernel", value="fused", step_as=partial(make_optimizer, "sgd", "loop"),
        step_with=lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_knob_is_caught(planted: str) -> None:
    report = verify("LlamaForCausalLM", [PLANTED[planted]])
    assert [row.verdict for row in report.knobs] == ["belongs to the workload"]
    assert not report.neutral


def test_dropped_random_numbers_are_named() -> None:
    report = verify("LlamaForCausalLM", [PLANTED["recomputation that drops the RNG"]])
    assert "other random numbers" in report.knobs[0].reason


def test_a_knob_that_does_not_run_is_not_checked() -> None:
    report = verify("LlamaForCausalLM", [Knob(name="compile", value="yes", prepare=fail)])
    assert report.neutral
    assert report.knobs[0].verdict == "not checked"
    assert report.knobs[0].reason == "does not run here: RuntimeError: no compiler here"


def test_two_ranks_are_neutral() -> None:
    asked = turn(activation_checkpointing="full", zero_stage=3, mesh=Mesh(dp_shard=8), optimizer_kernel="loop")
    rows = rows_of(verify("MixtralForCausalLM", asked))  # its router loss shows whether layers hand all out
    assert rows["sharding", "zero 3"].verdict == "neutral", rows["sharding", "zero 3"].reason
    assert "2 gloo ranks, not 8" in rows["sharding", "zero 3"].reason
    assert rows[TOGETHER, ""].verdict == "neutral", rows[TOGETHER, ""].reason


def test_too_few_sequences_and_a_model_without_loss_are_refused() -> None:
    model = build_model(CONFIGS["LlamaForCausalLM"].to_dict(), "LlamaForCausalLM")
    rows = make_rows("LlamaForCausalLM", model.config, 8)
    with pytest.raises(InvalidInput, match="8 sequences, not 3"):
        verify_neutrality(model, rows[:3], collate, turn())
    with pytest.raises(ProbeFailed, match="no gradient"):
        verify_neutrality(model, [{"input_ids": row["input_ids"]} for row in rows], collate, turn())


def test_nothing_outside_is_moved() -> None:
    model = build_model(CONFIGS["LlamaForCausalLM"].to_dict(), "LlamaForCausalLM")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    verify_neutrality(model, make_rows("LlamaForCausalLM", model.config, 8), collate, turn(padding_free=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def print_text(report: NeutralityReport) -> str:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as captured:
        console.print(format_neutrality(report))
    return captured.get()


def test_the_report_reads_what_it_describes_and_says_it() -> None:
    report = verify("MambaForCausalLM", turn(padding_free=True, layer_kernels="liger", attention_kernel="eager"))
    assert NeutralityReport.read(json.loads(json.dumps(report.describe()))) == report
    text = print_text(report)
    assert text.startswith("Not neutral: MambaForCausalLM; padding free changes the gradient by ")
    assert "Belongs to the workload" in text and "layer kernels liger: " in text


def make_plan(tmp_path: Path, *words: str) -> str:
    path, job = str(tmp_path / "plan.json"), ["meta-llama/Llama-3.2-1B", "--method", "full", "--gpu", "a100-80gb"]
    assert main(["plan", *job, *words, "--out", path]) == 0
    return path


def test_a_plan_is_verified_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", minversion="1.15")
    path = make_plan(tmp_path)
    capsys.readouterr()
    assert main(["verify", path]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Exact: LlamaForCausalLM") and "\nNeutral: LlamaForCausalLM; 3 knobs" in shown


def test_the_exit_code_is_of_either_proof(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", minversion="1.15")
    path = make_plan(tmp_path)
    capsys.readouterr()
    failed = KnobResult(knob="padding_free", value="yes", verdict="belongs to the workload", error=0.1)
    report = NeutralityReport(subject="LlamaForCausalLM", precision="fp32", knobs=(failed,))
    monkeypatch.setattr("brim.api.verify_neutrality", lambda plan: report)
    assert main(["verify", path, "--trainer", "plain", "--guarded", "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert document["exact"] is True and document["neutrality"]["neutral"] is False
    assert document["neutrality"]["knobs"][0]["knob"] == "padding_free"

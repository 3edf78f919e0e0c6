"""The trace as a user meets it: estimates, plans, timelines, models of their own, and what is said when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import brim
from brim.api.answerers import find_answerer
from brim.api.jobs import read_job
from brim.errors import InvalidInput, ProbeFailed, UnknownName, UnsupportedModel
from brim.planner.options import read_options

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 256,
}  # fmt: skip
MAMBA = {
    "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 6,
    "vocab_size": 512, "state_size": 8,
}  # fmt: skip
JOB = {"method": "full", "gpu": "a100-80gb", "trainer": "transformers", "seq_len": 128}


def write_model(folder: Path, config: dict[str, object]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return write_model(tmp_path / "llama", LLAMA)


def test_formula_and_trace_stand_side_by_side(llama: str) -> None:
    formula, trace = brim.estimate(llama, by=("formula", "trace"), micro_batch_size=4, **JOB)
    assert (formula.source, trace.source) == ("formula", "trace")
    assert abs(formula.peak_allocated_bytes / trace.peak_allocated_bytes - 1) < 0.02
    assert trace.tensors and trace.tensors[0].bytes >= trace.tensors[-1].bytes
    assert any("modeling_llama.py:" in one.line for one in trace.tensors) or trace.tensors[0].line == ""
    held = sum(one.bytes for one in trace.tensors)
    assert 0.5 * trace.peak_allocated_bytes < held <= trace.peak_allocated_bytes


def test_every_layer_can_be_run(llama: str) -> None:
    (folded,), (whole,) = (brim.estimate(llama, by=("trace",), fold=fold, **JOB) for fold in (True, False))
    assert folded.moments == whole.moments
    assert any("of 6 layers were run" in note for note in folded.notes)
    assert not any("layers were run" in note for note in whole.notes)


def test_a_plan_is_confirmed_by_the_trace(llama: str, tmp_path: Path) -> None:
    plan = brim.plan(llama, by="trace", effective_batch_size=16, **JOB)
    assert plan.estimate.source == "trace" and plan.estimate.tensors
    strategy = plan.strategy
    traced = find_answerer("trace", read_job(llama, read_options(JOB)))
    assert traced.estimate(plan.workload, strategy).peak_allocated_bytes == plan.estimate.peak_allocated_bytes
    assert plan.estimate.peak_allocated_bytes <= plan.budget_bytes
    brim.save_plan(plan, tmp_path / "plan.json")
    assert brim.load_plan(tmp_path / "plan.json") == plan


def test_a_plan_keeps_to_the_traced_budget(llama: str) -> None:
    """On a card too small for the whole batch, every strategy shown as fitting fits by the trace's own peak."""
    roomy = brim.plan(llama, by="trace", effective_batch_size=64, activation_checkpointing="none", **JOB)
    small = {**JOB, "gpu": "520MiB"}
    plan = brim.plan(llama, by="trace", effective_batch_size=64, activation_checkpointing="none", **small)
    assert plan.strategy.micro_batch_size < roomy.strategy.micro_batch_size
    largest = next(int(text.split(" is ")[1].split()[0]) for text in plan.reasons if "(solved by trace)" in text)
    assert plan.strategy.micro_batch_size <= largest < 2 * plan.strategy.micro_batch_size
    assert plan.estimate.peak_allocated_bytes <= plan.budget_bytes


def test_an_architecture_without_tables_is_traced(tmp_path: Path) -> None:
    model = write_model(tmp_path / "mamba", MAMBA)
    with pytest.raises(UnsupportedModel, match="--by trace"):
        brim.estimate(model, **JOB)
    (estimate,) = brim.estimate(model, by=("trace",), **JOB)
    assert estimate.peak_allocated_bytes > 0 and estimate.step_time is None
    assert any("mamba" in note for note in estimate.notes)


def test_an_architecture_nobody_knows_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "odd", {"model_type": "llamma", "hidden_size": 8})
    with pytest.raises(UnknownName, match="names no class"):
        brim.estimate(model, by=("trace",), **JOB)
    named = write_model(tmp_path / "odd", {"model_type": "llamma", "architectures": ["LlammaForCausalLM"]})
    with pytest.raises(ProbeFailed, match="no class 'LlammaForCausalLM'"):
        brim.estimate(named, by=("trace",), **JOB)


class OwnModel(torch.nn.Module):
    """Any module whose forward returns an object with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(256, 256) for _ in range(8))

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return SimpleNamespace(loss=x.float().mean())


def test_a_model_and_loss_of_ones_own(llama: str) -> None:
    plan = brim.plan(llama, effective_batch_size=16, **JOB)
    strategy = replace(plan.strategy, activation_checkpointing="none")
    inputs = {"x": (1024, 256)}
    estimate = brim.trace(plan.workload, strategy, OwnModel, lambda: {
        name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in inputs.items()
    })  # fmt: skip
    weights = 8 * (256 * 256 + 256) * 2
    peak = next(moment for moment in estimate.moments if moment.name == estimate.peak_moment)
    assert weights <= peak.ledger.parameters <= weights + 16 * 512
    assert peak.ledger.activations + peak.ledger.temporaries >= 8 * 1024 * 256 * 2


def test_lengths_that_vary_cut_the_pool_up(llama: str) -> None:
    options = {**JOB, "micro_batch_size": 8, "seq_len": 2048}
    (same,) = brim.estimate(llama, by=("trace",), **options)
    (varied,) = brim.estimate(llama, by=("trace",), lengths=(700, 2048, 1100, 1500, 900, 1900), **options)
    assert varied.peak_allocated_bytes <= same.peak_allocated_bytes * 1.01
    assert varied.peak_reserved_bytes > same.peak_reserved_bytes


def test_timeline_and_counters_are_written(llama: str, tmp_path: Path) -> None:
    page, counters = tmp_path / "step.html", tmp_path / "step.json"
    (estimate,) = brim.estimate(llama, by=("trace",), timeline=page, trace_json=counters, **JOB)
    assert "<svg" in page.read_text(encoding="utf-8")
    tracks = json.loads(counters.read_text(encoding="utf-8"))["traceEvents"]
    allocated = [event for event in tracks if event["ph"] == "C"]
    assert allocated and any(estimate.peak_allocated_bytes in event["args"].values() for event in allocated)


@pytest.mark.parametrize("options", [{"timeline": "x.html"}, {"lengths": (5, 6)}])
def test_what_only_the_trace_has_is_asked_of_the_trace(llama: str, options: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="ask by trace"):
        brim.estimate(llama, **options, **JOB)  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [(0,), ("a",), (1,) * 300, 5])
def test_lengths_that_cannot_be_meant_are_refused(llama: str, lengths: object) -> None:
    with pytest.raises(InvalidInput, match="lengths must be"):
        brim.estimate(llama, by=("trace",), lengths=lengths, **JOB)  # type: ignore[arg-type]


def test_a_missing_extra_names_the_pip_line(llama: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\nimport brim\n"
        f"try: brim.estimate({llama!r}, by=('trace',), gpu='24GiB')\n"
        "except brim.BrimError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "--by trace needs torch: pip install 'brim[trace]'", done.stderr


def test_what_is_recomputed_under_autocast_is_as_it_was(tmp_path: Path) -> None:
    """CUDA's autocast runs layer norms in fp32, in the backward pass as well, where checkpointing runs them again."""
    gpt2 = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4,
        "n_positions": 128, "vocab_size": 512,
    }  # fmt: skip
    model = write_model(tmp_path / "gpt2", gpt2)
    peaks = []
    for kind in ("none", "selective", "full"):
        knobs = {**JOB, "method": "lora", "trainer": "trl", "activation_checkpointing": kind}
        (estimate,) = brim.estimate(model, by=("trace",), micro_batch_size=64, **knobs)
        peaks.append(estimate.peak_allocated_bytes)
    assert peaks[0] > peaks[1] > peaks[2]

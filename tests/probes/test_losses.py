"""Losses as other projects compute them: beside TRL's own kernel, beside transformers' values, beside real steps."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch

from brim.errors import ProbeFailed
from brim.probes import loss_kernels, losses
from brim.probes.loss_kernels import ChunkedLogProb, liger_chunks, unsloth_rows
from brim.probes.losses import replace_loss
from brim.probes.model import give_tensors, prepare_model
from brim.probes.tracker import StorageTracker
from brim.spec.recipe import Engine
from real_steps import Case, measure_phases, trace_phases
from tiny_models import build_tiny, tiny_config, tiny_inputs

OLD = Engine(name="transformers", frees_narrow_logits=True, copies_shifted_logits=True)
KEPT = Engine(name="litgpt", keeps_loss_chunks=True, frees_narrow_logits=True, logits_alive_in_backward=True)
EIGHTHS = Engine(name="torchtune", keeps_loss_chunks=True)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def follow(run: Callable[[], Any], *given: torch.Tensor) -> tuple[list[int], Any]:
    """Return every allocation (above 0) and free (below) of a run on real tensors, and what it returned."""
    tracker = StorageTracker(block_bytes=1)
    tracker.follow([(str(index), one) for index, one in enumerate(given)], "input")
    tracker.events.clear()
    with tracker:
        result = run()
    return [event.num_bytes for event in tracker.events if event.num_bytes], result


@pytest.mark.parametrize("trains_head", [False, True])
def test_chunked_head_allocates_what_trl_allocates(monkeypatch: pytest.MonkeyPatch, trains_head: bool) -> None:
    """TRL's own function, its folding of a tile left out: on a card that is a kernel which writes into the tile."""
    trl_kernel = pytest.importorskip("trl.kernels.chunked_logprob")
    pytest.importorskip("trl.trainer.utils")  # its backward pass imports it
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        monkeypatch.setattr(trl_kernel, name, lambda *_, **__: None)
    monkeypatch.setattr(trl_kernel, "TOKEN_CHUNK_SIZE", 64)
    monkeypatch.setattr(loss_kernels, "TILE_TOKENS", 64)
    monkeypatch.setattr(loss_kernels, "TILE_VOCABULARY", 100)
    targets = torch.zeros(200, dtype=torch.long)
    outputs = ("log_probs", "entropy", "is_top1")

    def run(apply: Callable[[torch.Tensor, torch.Tensor], Any]) -> tuple[list[int], Any, list[Any]]:
        hidden = torch.zeros(200, 32, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros(250, 32, dtype=torch.bfloat16, requires_grad=trains_head)

        def step() -> Any:
            found = apply(hidden, weight)
            torch.autograd.backward(found[0], torch.ones_like(found[0]))
            return found

        changes, found = follow(step, hidden, weight, targets)
        return changes, found, [None if one.grad is None else one.grad.dtype for one in (hidden, weight)]

    def run_trl(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        made = trl_kernel.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 100, None, 1.0, outputs)
        return made[0], made[1], made[4]

    theirs = run(run_trl)
    ours = run(lambda hidden, weight: ChunkedLogProb.apply(hidden, weight, None, targets))
    assert [(one.shape, one.dtype) for one in ours[1]] == [(one.shape, one.dtype) for one in theirs[1]]
    assert ours[2] == theirs[2]
    assert sorted(ours[0]) == sorted(theirs[0])
    assert peak(ours[0]) == peak(theirs[0])


def peak(changes: list[int]) -> int:
    live = highest = 0
    for change in changes:
        live += change
        highest = max(highest, live)
    return highest


@pytest.mark.parametrize("engine", [OLD, KEPT, EIGHTHS, Engine(name="plain", upcasts_logits=False)])
@pytest.mark.parametrize("family", [
    "granite", pytest.param("llama", marks=pytest.mark.slow), pytest.param("gemma2", marks=pytest.mark.slow)
])  # fmt: skip
def test_the_loss_is_that_of_transformers(engine: Engine, family: str) -> None:
    """How logits are kept is no business of the loss: the value and the gradients stay."""
    case = Case(family, engine=engine, loss_kernel="chunked" if engine.keeps_loss_chunks else "dense")
    config = tiny_config(family, 2, attention="eager")
    inputs = tiny_inputs(config)
    found = []
    for changes in (False, True):
        model = build_tiny(config, torch.float32)
        if changes:
            replace_loss(model, case.workload.recipe, case.strategy)
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss.detach(), model.get_output_embeddings().weight.grad))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


CASES = {
    "transformers 4.45": lambda: Case("llama", engine=OLD),
    "kept chunks": lambda: Case("llama", engine=KEPT, loss_kernel="chunked"),
    "eighths": lambda: Case("llama", engine=EIGHTHS, loss_kernel="chunked", method="lora"),
    "tiles": lambda: Case("llama", loss_kernel="chunked", gradient_accumulation_steps=2),
    "liger": lambda: Case("llama", loss_kernel="fused"),
    "old liger, lora": lambda: Case("llama", loss_kernel="fused", layer_kernels="foak", method="lora"),
    "unsloth": lambda: Case("llama", loss_kernel="fused", layer_kernels="unsloth"),
    "over the logits": lambda: Case("llama", engine=OLD, layer_kernels="foak"),
}


@pytest.mark.parametrize("name", [
    name if name in ("liger", "transformers 4.45") else pytest.param(name, marks=pytest.mark.slow) for name in CASES
])  # fmt: skip
def test_bytes_at_every_phase_are_those_of_a_real_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_kernels, "TILE_VOCABULARY", 200)
    case = CASES[name]()
    real, traced = measure_phases(case), trace_phases(case)
    assert set(real) == set(traced)
    for phase, num_bytes in real.items():
        assert traced[phase] == pytest.approx(num_bytes, rel=0.001, abs=4096), phase


@pytest.mark.parametrize(("kernel", "kernels", "returns_logits"), [
    ("fused", "none", True), ("fused", "unsloth", False), ("chunked", "none", False),
])  # fmt: skip
def test_evaluation_makes_the_logits_that_the_package_makes(
    kernel: str, kernels: str, returns_logits: bool
) -> None:
    """Liger skips logits in training alone; TRL and Unsloth always."""
    case = Case("llama", loss_kernel=kernel, layer_kernels=kernels)
    model = prepare_model(case.build, case.workload.recipe, case.strategy)
    give_tensors(model)
    inputs = case.make_inputs()
    assert model(**inputs).logits is None
    model.eval()
    assert (model(**inputs).logits is not None) == returns_logits


def test_without_labels_the_model_is_itself() -> None:
    case = Case("llama", engine=OLD)
    config = tiny_config("llama", 2)
    inputs = tiny_inputs(config)
    model = build_tiny(config, torch.float32)
    before = model(input_ids=inputs["input_ids"]).logits
    replace_loss(model, case.workload.recipe, case.strategy)
    assert torch.equal(model(input_ids=inputs["input_ids"]).logits, before)


def test_a_plain_dense_loss_is_left_alone() -> None:
    case = Case("llama")
    model = build_tiny(tiny_config("llama", 1), torch.float32)
    replace_loss(model, case.workload.recipe, case.strategy)
    assert "forward" not in vars(model)
    labels = torch.tensor([[1, 2, 3]])
    assert losses._shift(labels).tolist() == [[2, 3, -100]]


@pytest.mark.parametrize("kernel", ["chunked", "fused"])
def test_a_head_that_is_no_vocabulary_is_refused(kernel: str) -> None:
    case = Case("bert", loss_kernel=kernel)
    with pytest.raises(ProbeFailed, match=f"no output matrix that a {kernel} loss takes over; .* loss kernel dense"):
        prepare_model(case.build, case.workload.recipe, case.strategy)


def test_liger_takes_as_many_rows_as_its_example_says() -> None:
    """The example in its source: 16,384 tokens, 32,000 words, 4,096 wide: chunks of 2,048."""
    chunks = liger_chunks(torch.Size((16_384, 4_096)), torch.Size((32_000, 4_096)))
    assert len(chunks) == 8 and chunks[0] == slice(0, 2_048) and chunks[-1].stop == 16_384
    assert liger_chunks(torch.Size((5, 64)), torch.Size((32, 64))) == [slice(0, 5)]


def test_unsloth_takes_no_fewer_rows_than_512() -> None:
    assert unsloth_rows(4_096, 4_096, 128_256) == 512
    assert unsloth_rows(100, 4_096, 128_256) == 100
    assert unsloth_rows(65_536, 4_096, 32_000) == 4_096


def test_shifted_logits_go_back_through_two_slices() -> None:
    """Torch of that time keeps `:` as a slice, so that a second tensor of shifted logits lives in the backward pass."""
    logits = torch.zeros(2, 5, 7, requires_grad=True)
    labels = torch.ones(2, 5, dtype=torch.long)
    loss = losses._cross_entropy(logits, labels, OLD, in_place=True)
    sizes, _ = follow(loss.backward)
    shifted, whole = 2 * 4 * 7 * 4, 2 * 5 * 7 * 4
    first = shifted  # the loss's own, written over
    assert [size for size in sizes if size in (shifted, whole)] == [first, shifted, whole]

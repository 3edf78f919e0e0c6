"""DPO traced against TRL's own trainer: one process, one model, bytes metered by torch.profiler."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peft
import torch
from datasets import Dataset
from meter import measure_peak, trace_peak
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from brim.errors import ProbeFailed
from brim.probes.preferences import pair_inputs
from brim.probes.trace import trace
from brim.spec.recipe import Engine, Preference
from real_steps import BATCH, LENGTH, Case

STEPS = 2


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def pair_case(reference: str, method: str, **knobs: object) -> Case:
    engine = Engine(name="trl-dpo", evaluates=False)
    chosen = {"loss_kernel": "chunked", "optimizer_kernel": "fused", **knobs}
    case = Case("llama", engine=engine, method=method, **chosen)  # type: ignore[arg-type]
    recipe = replace(case.workload.recipe, preference=Preference(reference=reference))  # type: ignore[arg-type]
    case.workload = replace(case.workload, recipe=recipe)
    return case


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def train(case: Case, folder: Path) -> Callable[[], Any]:
    """Return TRL's training loop over pairs as long as the case's sequences."""
    answer = " ".join("b" * (LENGTH - 2))
    rows = [{"prompt": "a ", "chosen": answer, "rejected": answer}] * (BATCH * STEPS)
    recipe, strategy = case.workload.recipe, case.strategy
    config = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=BATCH, bf16=False, use_cpu=True, max_steps=STEPS,
        gradient_checkpointing=strategy.activation_checkpointing == "full", optim="adamw_torch_fused",
        gradient_accumulation_steps=1, report_to=[], save_strategy="no", max_length=LENGTH, logging_steps=1,
        precompute_ref_log_probs=recipe.preference.reference == "precomputed", disable_tqdm=True,
    )  # fmt: skip
    lora = None
    if recipe.lora is not None:
        lora = peft.LoraConfig(
            r=recipe.lora.r, lora_alpha=recipe.lora.alpha, target_modules=list(recipe.lora.target_modules)
        )
    trainer = DPOTrainer(
        model=case.build(), ref_model=case.build() if recipe.preference.reference == "model" else None, args=config,
        train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer(), peft_config=lora,
    )  # fmt: skip
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape == (2 * BATCH, LENGTH)
    return trainer.train


CASES = {
    "adapter": lambda: pair_case("adapter", "lora"),
}
SLOW = {
    "model": lambda: pair_case("model", "full"),
    "model, checkpointed": lambda: pair_case("model", "full", activation_checkpointing="full"),
    "precomputed": lambda: pair_case("precomputed", "full"),
    "adapter, checkpointed": lambda: pair_case("adapter", "lora", activation_checkpointing="full"),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_peak_is_that_of_trls_trainer(name: str, tmp_path: Path) -> None:
    case = (CASES | SLOW)[name]()
    real, traced = measure_peak(train(case, tmp_path)), trace_peak(case)
    assert traced == pytest.approx(real, rel=0.002), (name, real, traced)


def card_case(reference: str, method: str = "full", depth: int = 2) -> Case:
    return pair_case(reference, method, dtype="bf16", attention="sdpa", depth=depth)


def highest(case: Case, **knobs: Any) -> dict[str, Any]:
    found = trace(case.workload, case.strategy, case.build, **knobs)
    return {moment.name: moment.ledger for moment in found.moments}


def test_a_second_model_is_counted_once_and_runs_after_the_first() -> None:
    alone, both = highest(card_case("precomputed")), highest(card_case("model"))
    assert "reference forward" in both and "reference forward" not in alone
    weights = 2 * sum(one.numel() for one in card_case("model").build().parameters())
    second = both["loss"].parameters - alone["loss"].parameters
    assert second == pytest.approx(weights, rel=0.01)
    # What the first model keeps for its backward pass waits meanwhile.
    assert both["reference forward"].activations >= alone["loss backward"].activations * 0.95


def test_an_adapter_switched_off_costs_no_second_model() -> None:
    without, adapter = highest(card_case("precomputed", "lora")), highest(card_case("adapter", "lora"))
    assert adapter["loss"].parameters == without["loss"].parameters
    assert "reference forward" in adapter


@pytest.mark.slow
def test_pairs_fold_like_single_answers() -> None:
    folded, whole = highest(card_case("model", depth=6)), highest(card_case("model", depth=6), fold=False)
    assert folded == whole


def test_on_a_card_no_copy_of_a_tile_is_made() -> None:
    """Triton kernels write into the one tile; PyTorch's stand-ins for other devices make several of its size."""
    case = card_case("precomputed")
    tile = 2 * BATCH * (LENGTH - 1) * 32_768 * 2
    assert highest(case)["loss"].temporaries < 1.1 * tile + 2**20


def test_inputs_that_are_no_text_are_refused() -> None:
    case = card_case("precomputed")
    with pytest.raises(ProbeFailed, match="pairs of answers with pixel_values"):
        pair_inputs(lambda: {**case.make_inputs(), "pixel_values": torch.zeros(1)}, case.workload.recipe)()

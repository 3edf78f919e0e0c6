"""The formula's order relations: what more of a thing does to memory, whatever the model, method and kernels."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from time_jobs import job, read_card, way

from brim.cost.estimate import estimate, peak_bytes
from brim.cost.ledger import Ledger
from brim.cost.overhead import context_bytes
from brim.cost.states import count_states, step_temporaries_bytes
from brim.spec.recipe import Engine
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.tables.read import list_cards
from brim.units import GIB

MODELS = ("gpt2", "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.1-8B", "google/gemma-2-2b", "mistralai/Mixtral-8x7B-v0.1",
          "google-t5/t5-small")  # fmt: skip
GPUS = ("t4", "rtx-4090", "a100-80gb", "h100", "mi300x")
METHODS = ("full", "lora", "qlora")
MODES = ("none", "selective", "full")
FEW = settings(max_examples=30, deadline=None)
MANY = settings(max_examples=100, deadline=None)
engines = st.builds(
    Engine, name=st.just("trl"), set_to_none=st.booleans(), logits_alive_in_backward=st.booleans(),
    upcasts_logits=st.booleans(), fused_experts=st.booleans(), evaluates=st.booleans(),
    reentrant_checkpointing=st.booleans(),
)  # fmt: skip


@st.composite
def jobs(draw: st.DrawFn, models: tuple[str, ...] = MODELS) -> Workload:
    """Draw a job: a card, a method, a precision, an engine."""
    workload = job(
        model=draw(st.sampled_from(models)), gpu=draw(st.sampled_from(GPUS)), method=draw(st.sampled_from(METHODS)),
        seq_len=draw(st.sampled_from([64, 512, 2048])), engine=draw(engines), autocast=draw(st.booleans()),
        weight_dtype=draw(st.sampled_from(["bf16", "fp32"])),
        optimizer=draw(st.sampled_from(["adamw", "adamw-8bit", "sgd", "adafactor"])),
    )  # fmt: skip
    return replace(workload, data=replace(workload.data, packing=draw(st.booleans())))


ways = st.builds(
    way, micro_batch_size=st.integers(1, 32), gradient_accumulation_steps=st.integers(1, 8),
    activation_checkpointing=st.sampled_from(MODES), attention_kernel=st.sampled_from(["eager", "sdpa", "flash"]),
    loss_kernel=st.sampled_from(["dense", "chunked", "fused"]),
    optimizer_kernel=st.sampled_from(["foreach", "fused", "loop"]),
    layer_kernels=st.sampled_from(["none", "liger", "unsloth"]), padding_free=st.booleans(),
    activation_offload=st.booleans(),
)  # fmt: skip


def at_moment(workload: Workload, strategy: Strategy, name: str) -> Ledger:
    """Return the ledger of a moment."""
    return next(moment.ledger for moment in estimate(workload, strategy).moments if moment.name == name)


@FEW
@given(jobs(), ways)
def test_the_int_peak_is_the_highest_moment(workload: Workload, strategy: Strategy) -> None:
    """What the search asks for is the maximum over the moments that are shown, and names one of them."""
    answer = estimate(workload, strategy)
    totals = {moment.name: moment.total_bytes for moment in answer.moments}
    assert peak_bytes(workload, strategy) == answer.peak_allocated_bytes == max(totals.values())
    assert totals[answer.peak_moment] == answer.peak_allocated_bytes
    assert len(totals) == len(answer.moments)


@FEW
@given(jobs(), ways)
def test_rows_sum_to_the_moment_and_none_is_negative(workload: Workload, strategy: Strategy) -> None:
    """Every moment is the sum of its rows; parameters, inputs and overhead are the same in all of them."""
    moments = estimate(workload, strategy).moments
    for moment in moments:
        rows = [getattr(moment.ledger, row.name) for row in fields(Ledger)]
        assert min(rows) >= 0 and sum(rows) == moment.total_bytes
    constant = {(moment.ledger.parameters, moment.ledger.inputs, moment.ledger.overhead) for moment in moments}
    assert len(constant) == 1


@FEW
@given(jobs(), ways)
def test_allocated_reserved_device(workload: Workload, strategy: Strategy) -> None:
    """The allocator holds at least what is allocated, the device at least that and the context."""
    answer = estimate(workload, strategy)
    assert 0 < answer.peak_allocated_bytes <= answer.peak_reserved_bytes
    paged = count_states(workload.model, workload.recipe).paged_bytes
    assert answer.device_bytes == answer.peak_reserved_bytes + context_bytes(workload.cluster.device) + paged


@MANY
@given(jobs(), ways, st.integers(1, 8))
def test_a_larger_micro_batch_never_needs_less(workload: Workload, strategy: Strategy, more: int) -> None:
    """More sequences at a time cost memory or nothing."""
    larger = replace(strategy, micro_batch_size=strategy.micro_batch_size + more)
    assert peak_bytes(workload, larger) >= peak_bytes(workload, strategy)


@MANY
@given(jobs(), ways)
def test_accumulating_never_needs_less(workload: Workload, strategy: Strategy) -> None:
    """Gradients that wait for the next micro-batch cost memory; how many micro-batches follow does not matter."""
    once, twice, often = (
        peak_bytes(workload, replace(strategy, gradient_accumulation_steps=steps)) for steps in (1, 2, 9)
    )
    assert once <= twice == often


@MANY
@given(jobs(), ways)
def test_a_longer_sequence_never_needs_less(workload: Workload, strategy: Strategy) -> None:
    """Twice the length costs memory or nothing."""
    longer = replace(workload, data=replace(workload.data, seq_len=2 * workload.data.seq_len))
    assert peak_bytes(longer, strategy) >= peak_bytes(workload, strategy)


@FEW
@given(jobs(), ways)
def test_more_checkpointing_never_keeps_more(workload: Workload, strategy: Strategy) -> None:
    """At the loss, full checkpointing holds at most what selective does, and that at most what none does."""
    none, selective, full = (
        at_moment(workload, replace(strategy, activation_checkpointing=mode), "loss").activations for mode in MODES
    )
    assert none >= selective >= full


@MANY
@given(jobs(), ways)
def test_offloading_activations_never_needs_more(workload: Workload, strategy: Strategy) -> None:
    """What lies in host memory does not lie on the device."""
    here, away = (peak_bytes(workload, replace(strategy, activation_offload=moved)) for moved in (False, True))
    assert away <= here


@MANY
@given(jobs(), ways)
def test_copies_of_all_weights_never_need_less_than_none(workload: Workload, strategy: Strategy) -> None:
    """A fused optimizer kernel needs no temporaries, a loop some, foreach copies of everything."""
    foreach, fused, loop = (
        peak_bytes(workload, replace(strategy, optimizer_kernel=kernel)) for kernel in ("foreach", "fused", "loop")
    )
    assert fused <= loop and fused <= foreach


@MANY
@given(jobs(), ways, st.sampled_from(["set_to_none", "logits_alive_in_backward", "upcasts_logits", "evaluates"]))
def test_what_an_engine_keeps_costs(workload: Workload, strategy: Strategy, habit: str) -> None:
    """Zeroing instead of dropping gradients, holding logits, upcasting them, evaluating: none is ever free memory."""
    peaks = []
    for kept in (False, True):
        engine = replace(workload.recipe.engine, **{habit: kept != (habit == "set_to_none")})
        peaks.append(peak_bytes(replace(workload, recipe=replace(workload.recipe, engine=engine)), strategy))
    assert peaks[0] <= peaks[1]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_adapters_need_less_than_full_training(model: str, mode: str) -> None:
    """LoRA needs less than full training, QLoRA less than LoRA, where weights are more than a few activations."""
    strategy = way(1, 2, activation_checkpointing=mode)
    full, lora, qlora = (peak_bytes(job(model=model, method=method, seq_len=512), strategy) for method in METHODS)
    assert lora < full
    assert qlora < lora or model == "google-t5/t5-small"  # 60M parameters: dequantising costs more than 4 bit saves


def kept_by_length(kernel: str, method: str) -> list[int]:
    """Return what is kept when the loss begins, at lengths in equal steps."""
    jobs_by_length = (job(seq_len=length, method=method) for length in (4096, 8192, 12288, 16384))
    return [at_moment(one, way(1, attention_kernel=kernel), "loss").activations for one in jobs_by_length]


@pytest.mark.parametrize("method", METHODS)
def test_eager_attention_is_quadratic_and_kernels_are_linear(method: str) -> None:
    """Second differences over length: none for sdpa and flash; for eager fp32 and 16-bit scores of 32 x 32 heads."""
    for kernel, second in (("flash", 0), ("sdpa", 0), ("eager", 2 * 4096**2 * 32 * 32 * (4 + 2))):
        one, two, three, four = kept_by_length(kernel, method)
        assert three - 2 * two + one == four - 2 * three + two == second


def test_evaluation_is_a_moment_only_if_the_loop_evaluates() -> None:
    """Evaluation with the training micro-batch makes logits with optimizer states in place."""
    with_it, without = (
        {moment.name: moment for moment in estimate(job(engine=Engine(name="trl", evaluates=one)), way(4)).moments}
        for one in (True, False)
    )
    assert set(with_it) - set(without) == {"evaluation"}
    assert with_it["evaluation"].ledger.temporaries > 4 * 2048 * 128_256 * 4
    assert with_it["evaluation"].ledger.optimizer_states == with_it["loss"].ledger.optimizer_states > 0
    assert "saving" in with_it


def test_the_step_is_its_states_and_temporaries() -> None:
    """At the optimizer step no activation is left: the rows are those of the states."""
    workload, strategy = job(), way(4, optimizer_kernel="foreach")
    ledger, states = at_moment(workload, strategy, "optimizer step"), count_states(workload.model, workload.recipe)
    assert (ledger.parameters, ledger.gradients) == (states.parameters_bytes, states.gradients_bytes)
    assert (ledger.optimizer_states, ledger.activations) == (states.optimizer_bytes, 0)
    assert ledger.temporaries == step_temporaries_bytes(workload.model, workload.recipe, "foreach")


def test_gradients_grow_while_the_backward_pass_goes_down() -> None:
    """Without accumulation gradients appear layer by layer; with it they are there all the time."""
    once, twice = (
        {moment.name: moment.ledger.gradients for moment in estimate(job(), way(1, steps)).moments} for steps in (1, 2)
    )
    total = twice["optimizer step"]
    assert once["loss"] == 0 <= once["loss backward"] < once["backward of layers"] <= once["optimizer step"] == total
    assert {twice[name] for name in ("loss", "loss backward", "backward of layers")} == {total}


@pytest.mark.parametrize("name", ["evaluation", "saving"])
def test_zeroed_gradients_stay_between_steps(name: str) -> None:
    """A loop that zeroes gradients rather than dropping them has them during evaluation and saving too."""
    freed, zeroed = (
        at_moment(job(engine=Engine(name="plain", set_to_none=one)), way(1), name) for one in (True, False)
    )
    assert (freed.gradients, zeroed.gradients) == (0, freed.parameters)


def test_the_first_step_has_no_optimizer_states() -> None:
    """A probe of a single pass would miss them: the first step is a moment of its own, below the steady ones."""
    moments = {moment.name: moment for moment in estimate(job(), way(4)).moments}
    assert moments["first step"].ledger.optimizer_states == 0
    assert moments["first step"].total_bytes < max(moment.total_bytes for moment in moments.values())


@FEW
@given(jobs(models=("gpt2",)), ways)
def test_the_same_question_has_the_same_answer(workload: Workload, strategy: Strategy) -> None:
    """Equal jobs get equal estimates, whatever was asked in between."""
    first = estimate(workload, strategy)
    estimate(replace(workload, data=replace(workload.data, seq_len=96)), replace(strategy, micro_batch_size=3))
    assert estimate(replace(workload), replace(strategy)) == first


@pytest.mark.parametrize("card", list_cards(), ids=lambda card: card.id)
def test_every_card_is_costed(card: Any) -> None:
    """Each built-in model has a peak above its weights, and below it with fewer sequences."""
    shape = read_card(card.id)
    length = shape.sequence_tokens or 256
    workload = replace(job(), model=shape, data=replace(job().data, seq_len=length))
    small, large = (peak_bytes(workload, way(micro, attention_kernel="sdpa")) for micro in (1, 16))
    assert count_states(shape, workload.recipe).parameters_bytes < small < large


def test_longer_answers_say_what_they_assume() -> None:
    """Lengths, evaluation and the spread over experts are assumptions of the answer."""
    notes = " ".join(estimate(job(model="mistralai/Mixtral-8x7B-v0.1"), way(1)).notes)
    assert "2,048 tokens" in notes and "evenly over experts" in notes and "evaluation" in notes


def test_an_8b_model_is_in_the_right_place() -> None:
    """Plain bf16 AdamW on 8.03B parameters: four bytes-of-two per parameter are 59.8 GiB before any activation."""
    ledger = at_moment(job(), way(1, activation_checkpointing="full"), "optimizer step")
    assert ledger.total_bytes == pytest.approx(8.03e9 * 8, rel=0.01)
    assert 59 * GIB < ledger.total_bytes < 61 * GIB

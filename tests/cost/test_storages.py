"""The storages of weights and gradients: together they are what the states count."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from time_jobs import job

from brim.cost.states import count_states
from brim.cost.storages import gradient_bytes, list_layer_gradients, list_outer_gradients, list_weights
from brim.spec.recipe import Engine
from brim.spec.workload import Workload

MODELS = ("gpt2", "meta-llama/Llama-3.1-8B", "google/gemma-2-2b", "mistralai/Mixtral-8x7B-v0.1", "google-t5/t5-small",
          "google-bert/bert-base-uncased", "openai/gpt-oss-20b")  # fmt: skip
jobs = st.builds(
    job, model=st.sampled_from(MODELS), method=st.sampled_from(["full", "lora", "qlora"]),
    weight_dtype=st.sampled_from(["bf16", "fp32"]), gradient_dtype=st.sampled_from([None, "fp32"]),
    engine=st.builds(Engine, name=st.just("trl"), fused_experts=st.booleans()),
)  # fmt: skip
MANY = settings(max_examples=60, deadline=None)


@MANY
@given(jobs)
def test_weights_are_the_parameters(workload: Workload) -> None:
    """No byte of the weights is left out or counted twice."""
    states = count_states(workload.model, workload.recipe)
    sizes = list_weights(workload.model, workload.recipe, states)
    assert min(sizes) > 0 and sum(sizes) == states.parameters_bytes


@MANY
@given(jobs)
def test_gradients_are_those_of_the_states(workload: Workload) -> None:
    """Layers, head and the rest make all gradients, in the dtype of gradients."""
    shape, recipe, states = workload.model, workload.recipe, count_states(workload.model, workload.recipe)
    inside = sum(group.count * sum(list_layer_gradients(group, recipe)) for group in shape.groups)
    before, after = list_outer_gradients(shape, recipe, states)
    assert inside + sum(before) + sum(after) == states.gradients_bytes
    assert states.gradients_bytes == states.trained_parameters * gradient_bytes(recipe)


def test_large_matrices_are_storages_of_their_own() -> None:
    """An 8B model in bf16: 7 matrices a layer, embedding, head, and one for all norms."""
    workload = job()
    sizes = list_weights(workload.model, workload.recipe, count_states(workload.model, workload.recipe))
    assert len(sizes) == 7 * 32 + 2 + 1
    assert sizes.count(2 * 4096 * 14336) == 3 * 32


def test_packed_weights_lie_apart_from_their_scales() -> None:
    """nf4 packs two weights a byte in a storage of its own: 4,096 x 14,336 are 28 MiB exactly."""
    workload = job(method="qlora")
    sizes = list_weights(workload.model, workload.recipe, count_states(workload.model, workload.recipe))
    assert sizes.count(28 * 2**20) == 3 * 32

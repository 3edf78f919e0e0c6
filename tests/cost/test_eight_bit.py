"""int8 products: one input for all that read it, hanging on the graph; answers in autocast's dtype."""

from __future__ import annotations

from typing import Any

import pytest
from time_jobs import EVERY_MATRIX, job, way

from brim.cost.blocks import Block, cost_layer
from brim.cost.eight_bit import multiply_eight_bit
from brim.cost.estimate import estimate
from brim.cost.setting import Setting, read_setting
from brim.cost.tape import Size, Tape, Tensor, fixed, per_token
from brim.spec.model import Linear
from brim.spec.recipe import Engine, Lora, Quantization
from brim.spec.workload import Workload

UP = Linear(name="up_proj", in_features=100, out_features=300)
INT8 = Quantization(kind="int8", upcast_rest=True)
WIDTH, INNER = 4096, 14336


def eight_bit_job(**recipe: Any) -> Workload:
    """Return Llama-3.1-8B with adapters in fp32 over int8 matrices, under autocast."""
    lora = Lora(r=16, alpha=32, target_modules=EVERY_MATRIX, dtype="fp32")
    return job(method="qlora", quantization=INT8, lora=lora, **({"autocast": True} | recipe))


def setting(autocast: bool) -> Setting:
    """Return the setting of that job."""
    return read_setting(eight_bit_job(autocast=autocast), way())


def layer(checkpointing: str, *, reentrant: bool = False) -> Block:
    """Return a layer of that job."""
    group = eight_bit_job().model.groups[0]
    return cost_layer(group, setting(True), checkpointing, reentrant)  # type: ignore[arg-type]


@pytest.mark.parametrize(("came", "autocast", "answers"), [(4, True, 2), (2, True, 2), (4, False, 4)])
def test_the_answer_is_in_the_dtype_of_autocast_or_of_the_input(came: int, autocast: bool, answers: int) -> None:
    tape, x = Tape(), Tensor("x", per_token(came * 100))
    assert multiply_eight_bit(tape, x, UP, setting(autocast), 1).size == per_token(answers * 300)


def test_the_input_is_kept_as_it_came_and_by_the_node() -> None:
    tape, x = Tape(), Tensor("x", per_token(400))
    multiply_eight_bit(tape, x, UP, setting(True), 1)
    (op,) = tape.ops
    assert op.clings == (x,) and op.saves == ()


def test_the_gradient_meets_the_matrix_in_the_dtype_of_the_input() -> None:
    """MatMul8bitLt.backward: the codes become a matrix of the input's dtype, and so does the gradient."""
    for came, gradient in ((4, per_token(4 * 300)), (2, per_token(0))):
        tape, x = Tape(), Tensor("x", per_token(came * 100))
        multiply_eight_bit(tape, x, UP, setting(True), 1)
        assert tape.ops[0].grad_scratch == fixed(came * 30_000) + gradient


def test_products_of_one_input_share_it() -> None:
    """A layer hangs on to four inputs: both norms' in fp32, attention's and the inner one in 16 bit."""
    assert layer("none").clinging == per_token(2 * 4 * WIDTH + 2 * WIDTH + 2 * INNER)


def test_checkpointing_does_not_see_what_hangs_on_the_graph() -> None:
    """Beside its input a checkpointed layer keeps the inputs of its products, unless its first pass has no graph."""
    plain, full, reentrant = layer("none"), layer("full"), layer("full", reentrant=True)
    assert full.kept == full.stream + plain.clinging
    assert reentrant.kept == reentrant.stream and reentrant.clinging == Size(0, 0)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_backward_pass_gives_none_of_it_up(checkpointing: str) -> None:
    """At the end of the backward pass the inputs of all 32 layers are still there."""
    workload = eight_bit_job(engine=Engine(name="transformers"))
    found = estimate(workload, way(activation_checkpointing=checkpointing))
    moments = {moment.name: moment.ledger.activations for moment in found.moments}
    clinging = 32 * layer(checkpointing).clinging.at(4 * 2048)
    assert moments["backward of layers"] > clinging
    assert moments["loss backward"] > clinging

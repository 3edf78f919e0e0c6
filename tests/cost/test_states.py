"""Weights, gradients and optimizer states, counted by hand on small models."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from time_jobs import read_card

from brim.cost.parameters import count_parameters, default_targets
from brim.cost.setting import quantised_bytes
from brim.cost.states import (
    count_states,
    largest_trained_tensor,
    layer_gradient_bytes,
    step_temporaries_bytes,
    trained_matrices,
)
from brim.errors import UnsupportedModel
from brim.readers.hf_config import read_config
from brim.spec.model import Linear, ModelShape
from brim.spec.recipe import Engine, Lora, Quantization, Recipe
from brim.tables.read import list_optimizers

# Two layers of width 64: q and o 64 x 64, k and v 64 x 32, gate, up and down 64 x 128; 100 words, head apart.
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
TABLE = 100 * 64
MATRICES = 2 * LAYER
VECTORS = 5 * 64
ALL = MATRICES + 2 * TABLE + VECTORS
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 100, "tie_word_embeddings": False,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
TINY = read_config(CONFIG, name="tiny")
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
TINY_MOE = read_config(CONFIG | EXPERTS, name="tiny-moe")
EXPERT = 3 * 64 * 128


def recipe(**chosen: Any) -> Recipe:
    """Return a full fine-tune in bf16 with AdamW, changed as asked."""
    return Recipe(**({"method": "full", "engine": Engine(name="trl")} | chosen))


def adapters(*targets: str, r: int = 8, dtype: str = "bf16", **chosen: Any) -> Recipe:
    """Return a LoRA recipe on some matrices."""
    lora = Lora(r=r, alpha=16, target_modules=targets, dtype=dtype)  # type: ignore[arg-type]
    return recipe(method="lora", lora=lora, **chosen)


def test_the_models_are_as_counted() -> None:
    """The hand count of both models is the count of the reader."""
    assert count_parameters(TINY) == ALL
    assert count_parameters(TINY_MOE) == ALL + 2 * (3 * EXPERT + 4 * 64)


@pytest.mark.parametrize(("dtype", "element"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_full_training_in_one_dtype(dtype: str, element: int) -> None:
    """Weights, gradients and both moments have the weights' dtype: 4 elements a parameter, not 16 bytes."""
    states = count_states(TINY, recipe(weight_dtype=dtype))
    assert (states.parameters_bytes, states.gradients_bytes) == (element * ALL, element * ALL)
    assert (states.optimizer_bytes, states.paged_bytes) == (2 * element * ALL, 0)


def test_master_weights_and_gradient_dtype() -> None:
    """A master copy is fp32 and so are the moments beside it: 12 bytes a parameter; gradients may be wide too."""
    states = count_states(TINY, recipe(master_weights=True, gradient_dtype="fp32"))
    assert states.gradients_bytes == 4 * ALL
    assert states.optimizer_bytes == (4 + 4 + 4) * ALL


@pytest.mark.parametrize(("chosen", "kernel", "size_bytes"), [
    ({}, "fused", 2 * ALL),
    ({}, "foreach", 2 * ALL + 4 * ALL),
    ({"gradient_dtype": "fp32"}, "fused", 0),
    ({"weight_dtype": "fp32"}, "loop", 2 * 4 * 64 * 128),
])  # fmt: skip
def test_gradients_are_widened_for_master_weights(chosen: dict[str, Any], kernel: str, size_bytes: int) -> None:
    """Beyond 16-bit gradients another two bytes each; what a kernel holds is in fp32."""
    assert step_temporaries_bytes(TINY, recipe(master_weights=True, **chosen), kernel) == size_bytes  # type: ignore


@pytest.mark.parametrize(("chosen", "copies"), [
    ({}, 4), ({"weight_dtype": "fp32"}, 2), ({"gradient_dtype": "fp32"}, 3),
])  # fmt: skip
def test_adafactor_widens_what_is_narrow(chosen: dict[str, Any], copies: int) -> None:
    """Two fp32 updates of the largest tensor, and fp32 copies of a 16-bit weight and gradient, in whatever kernel."""
    found = [step_temporaries_bytes(TINY, recipe(optimizer="adafactor", **chosen), one) for one in ("loop", "foreach")]  # type: ignore
    assert found == [4 * copies * 64 * 128] * 2


def test_muon_holds_a_matrix_or_what_adamw_holds_of_a_table() -> None:
    """Of a 64 x 128 matrix an update, two iterates and two 64 x 64 products; of experts, which AdamW updates, two."""
    one = recipe(optimizer="muon")
    assert step_temporaries_bytes(TINY, one, "loop") == 2 * 3 * 64 * 128 + 2 * 2 * 64 * 64
    assert step_temporaries_bytes(TINY_MOE, one, "loop") == 2 * 2 * (4 * 2 * 64 * 128)
    experts = 2 * 4 * EXPERT
    fused, apart = (
        count_states(TINY_MOE, recipe(optimizer="muon", engine=Engine(name="trl", fused_experts=way))).optimizer_bytes
        for way in (True, False)
    )
    assert fused - apart == 2 * experts


def test_adapters_train_alone() -> None:
    """LoRA of rank 8 on q and down: r x (in + out) each, and no gradient for the base."""
    states = count_states(TINY, adapters("q_proj", "down_proj", dtype="fp32"))
    trained = 2 * 8 * (64 + 64 + 128 + 64)
    assert states.trained_parameters == trained
    assert states.parameters_bytes == 2 * ALL + 4 * trained
    assert (states.gradients_bytes, states.optimizer_bytes) == (4 * trained, 8 * trained)


SMALL = VECTORS + 4 * 64 * 32  # below 4,096 elements: norms, keys and values
BY_HAND = {
    "adamw": 2 * 2 * ALL,
    "sgd": 0,
    "sgd-momentum": 2 * ALL,
    "lion": 4 * ALL,
    # Two bytes and two scales per 256; small tensors and the lookup table keep two fp32 states.
    "adamw-8bit": ceil((ALL - SMALL - TABLE) * (2 + 8 / 256)) + 8 * (SMALL + TABLE),
    "lion-8bit": ceil((ALL - SMALL - TABLE) * (1 + 4 / 256)) + 4 * (SMALL + TABLE),
    # A mean per row and one per column, in fp32; vectors whole.
    "adafactor": 4 * (2 * (2 * 128 + 2 * 96 + 3 * 192) + 2 * 164 + VECTORS),
    # One momentum per matrix, AdamW's two for embeddings, head and vectors.
    "muon": 2 * (MATRICES + 2 * (2 * TABLE + VECTORS)),
}


@pytest.mark.parametrize("optimizer", BY_HAND)
def test_optimizer_states_by_hand(optimizer: str) -> None:
    """Every optimizer's states on the small model are what its source keeps."""
    assert count_states(TINY, recipe(optimizer=optimizer)).optimizer_bytes == BY_HAND[optimizer]


def test_every_optimizer_of_the_table_is_counted_somewhere() -> None:
    """No optimizer is left out of these tests."""
    assert {row.name for row in list_optimizers()} == {*BY_HAND, "paged-adamw-8bit", "paged-adamw-32bit"}


def test_lookup_tables_are_not_quantised_by_the_hf_trainer_only() -> None:
    """A loop of one's own gives the embedding 8-bit states, transformers' Trainer fp32 ones: 6 bytes an element."""
    own, trainer = (
        count_states(TINY, recipe(optimizer="adamw-8bit", engine=Engine(name=name))) for name in ("plain", "trl")
    )
    assert trainer.optimizer_bytes - own.optimizer_bytes == pytest.approx(TABLE * (8 - 2 - 8 / 256), abs=1)


@pytest.mark.parametrize(("optimizer", "scales"), [("paged-adamw-32bit", 0), ("paged-adamw-8bit", 8 / 256)])
def test_only_large_tensors_are_paged(optimizer: str, scales: float) -> None:
    """Managed memory holds states of tensors from 100,000 elements on; scales and the rest stay in the allocator."""
    tiny = count_states(TINY, recipe(optimizer=optimizer))
    assert (tiny.paged_bytes, tiny.optimizer_bytes > 0) == (0, True)
    llama = read_card("meta-llama/Llama-3.1-8B")
    full = count_states(llama, recipe(optimizer=optimizer))
    assert full.optimizer_bytes == pytest.approx(scales * (count_parameters(llama) - 128_256 * 4096), abs=5e6)
    assert full.paged_bytes > 1.9 * count_parameters(llama)
    # Of rank-16 adapters the halves beside 14,336 channels are paged, the others are not: 65,536 elements at most.
    lora = count_states(llama, adapters(*default_targets(llama), r=16, optimizer=optimizer))
    paged = 32 * 3 * 16 * 14_336
    assert lora.paged_bytes == pytest.approx(paged * (2 if scales else 8), rel=0.01)
    per_element = 2 + scales if scales else 8
    assert lora.paged_bytes + lora.optimizer_bytes == pytest.approx(lora.trained_parameters * per_element, rel=0.01)


@pytest.mark.parametrize(
    ("quantization", "size_bytes"),
    [
        (Quantization(kind="nf4"), 4096 // 2 + 4 * 64),
        (Quantization(kind="fp4"), 4096 // 2 + 4 * 64),
        (Quantization(kind="nf4", double_quant=True), 4096 // 2 + 64 + 4 * 1),
        (Quantization(kind="int8"), 4096 + 4 * 64),
        (Quantization(kind="fp8"), 4096 + 4 * 1),
        # Scales in fp16 and zeros in int4 per group of inputs and output, a group number in int32 per input.
        (Quantization(kind="gptq-int4", block_size=32), 4096 // 2 + 2 * 64 * 2 + 2 * 64 // 2 + 4 * 64),
    ],
    ids=lambda value: getattr(value, "kind", None),
)  # fmt: skip
def test_quantised_storage_by_hand(quantization: Quantization, size_bytes: int) -> None:
    """A matrix of 64 x 64 takes half a byte or a byte an element, and its scales."""
    assert quantised_bytes(Linear(name="q", in_features=64, out_features=64), quantization) == size_bytes


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["nf4", "fp4", "int8", "fp8", "gptq-int4"]))
def test_quantising_makes_no_matrix_larger(rows: int, columns: int, kind: str) -> None:
    """Every storage takes at least its bits and less than 16 bit."""
    linear = Linear(name="q", in_features=256 * rows, out_features=256 * columns)
    block = 128 if kind == "gptq-int4" else 64
    size = quantised_bytes(linear, Quantization(kind=kind, block_size=block))  # type: ignore[arg-type]
    assert linear.num_weights // 2 <= size < 1.3 * linear.num_weights


def test_a_quantised_base_spares_embeddings_head_and_norms() -> None:
    """bitsandbytes replaces the matrices of the layers; the rest stays as loaded, or in fp32 after PEFT's upcast."""
    packed = MATRICES // 2 + 4 * MATRICES // 64
    chosen = {"method": "qlora", "lora": adapters("q_proj").lora}
    trained = 2 * 8 * 128 * 2
    plain = count_states(TINY, recipe(quantization=Quantization(kind="nf4"), **chosen))
    upcast = count_states(TINY, recipe(quantization=Quantization(kind="nf4", upcast_rest=True), **chosen))
    assert plain.parameters_bytes == packed + 2 * (2 * TABLE + VECTORS) + trained
    assert upcast.parameters_bytes == packed + 4 * (2 * TABLE + VECTORS) + trained


def test_fused_experts_are_not_quantised() -> None:
    """Experts in one 3-D parameter stay in 16 bit, and so does the router; experts of their own are packed."""
    chosen = {"method": "qlora", "lora": adapters("q_proj").lora, "quantization": Quantization(kind="nf4")}
    fused, apart = (
        count_states(TINY_MOE, recipe(engine=Engine(name="trl", fused_experts=one), **chosen)).parameters_bytes
        for one in (True, False)
    )
    unpacked = 2 * (4 * EXPERT + 4 * 64)
    assert fused - apart == 2 * unpacked - (unpacked // 2 + 4 * unpacked // 64)


def test_adapters_on_routed_experts_are_refused() -> None:
    """What PEFT does to fused experts has no tape: it is refused with a way out, not guessed."""
    with pytest.raises(UnsupportedModel, match="--lora-targets"):
        count_states(read_card("Qwen/Qwen3-30B-A3B"), adapters("gate_proj"))


@pytest.mark.parametrize(
    ("kernel", "size_bytes"), [("foreach", 2 * ALL), ("loop", 2 * 2 * 64 * 128), ("fused", 0)]
)
def test_adamw_temporaries_by_kernel(kernel: str, size_bytes: int) -> None:
    """foreach copies all trained weights, a loop two copies of the largest tensor, a fused kernel nothing."""
    assert step_temporaries_bytes(TINY, recipe(), kernel) == size_bytes  # type: ignore[arg-type]


def test_the_largest_tensor_of_fused_experts_is_all_of_them() -> None:
    """Gate and up of four experts are one parameter."""
    assert largest_trained_tensor(TINY_MOE, recipe()) == 4 * 2 * 64 * 128
    assert largest_trained_tensor(TINY_MOE, recipe(engine=Engine(name="trl", fused_experts=False))) == 2 * 64 * 128
    assert largest_trained_tensor(TINY, recipe()) == 64 * 128


CARDS = (
    "gpt2", "meta-llama/Llama-3.1-8B", "google/gemma-2-2b", "mistralai/Mixtral-8x7B-v0.1", "deepseek-ai/DeepSeek-V3",
    "google-t5/t5-small", "openai/gpt-oss-20b",
)  # fmt: skip
shapes = st.sampled_from(CARDS).map(read_card)


@given(shapes, st.booleans(), st.sampled_from(["bf16", "fp32"]), st.sampled_from([None, "fp32"]))
def test_layers_and_the_rest_make_all_gradients(shape: ModelShape, full: bool, dtype: str, wide: str | None) -> None:
    """The gradients of the layers are those of the model, but for embeddings and head."""
    chosen = {"gradient_dtype": wide, "weight_dtype": dtype}
    one = recipe(**chosen) if full else adapters(*default_targets(shape), dtype=dtype, **chosen)
    inside = sum(group.count * layer_gradient_bytes(group, one) for group in shape.groups)
    outside = count_states(shape, one).gradients_bytes - inside
    element = count_states(shape, one).gradients_bytes // count_states(shape, one).trained_parameters
    layers = count_parameters(replace(shape, embeddings=(), stem=(), head=(), other_parameters=0))
    assert outside == (element * (count_parameters(shape) - layers) if full else 0)


@given(shapes, st.integers(1, 64), st.sampled_from([row.name for row in list_optimizers()]))
def test_adapters_never_cost_more_states_than_full_training(shape: ModelShape, r: int, optimizer: str) -> None:
    """LoRA adds its own weights and saves gradients and moments of the base."""
    full = count_states(shape, recipe(optimizer=optimizer))
    lora = count_states(shape, adapters(*default_targets(shape), r=r, optimizer=optimizer))
    assert lora.gradients_bytes <= full.gradients_bytes
    assert lora.optimizer_bytes + lora.paged_bytes <= full.optimizer_bytes + full.paged_bytes
    assert lora.parameters_bytes == full.parameters_bytes + 2 * lora.trained_parameters


@given(shapes, st.integers(1, 64))
def test_adapter_matrices_are_all_that_trains(shape: ModelShape, r: int) -> None:
    """Rows times columns of the adapters' matrices sum to the trained parameters."""
    one = adapters(*default_targets(shape), r=r)
    trained = sum(rows * columns * copies for rows, columns, copies in trained_matrices(shape, one))
    assert trained == count_states(shape, one).trained_parameters

"""Adapters fused with their matrices (Unsloth): results stay, inputs are kept once, one buffer unpacks all matrices."""

from __future__ import annotations

from typing import Any

import pytest
from time_jobs import EVERY_MATRIX, job, way

from brim.cost.blocks import cost_layer
from brim.cost.layers import record_layer
from brim.cost.setting import Setting, read_setting
from brim.cost.tape import fixed, per_token
from brim.spec.recipe import Lora
from brim.spec.workload import Workload

WIDTH, KEYS, INNER = 4096, 1024, 14336


def fused_setting(kernels: str = "unsloth", **adapter: Any) -> tuple[Workload, Setting]:
    """Return a QLoRA of Llama-3.1-8B under a package of kernels, and its setting."""
    lora = Lora(r=16, alpha=32, target_modules=EVERY_MATRIX, dtype="fp32", **adapter)
    workload = job(method="qlora", lora=lora, autocast=True)
    return workload, read_setting(workload, way(layer_kernels=kernels))


def saved(workload: Workload, setting: Setting) -> list[tuple[str, int]]:
    """Return what a layer keeps, by name and bytes a token, each tensor once."""
    tape, _ = record_layer(workload.model.groups[0], setting)
    tensors = {id(tensor): tensor for op in tape.ops if op.output.needs_grad for tensor in op.saves}
    return [(tensor.name, tensor.size.per_token) for tensor in tensors.values()]


def test_fused_adapters_keep_inputs_and_the_projections_of_the_mlp() -> None:
    """Nothing of adapters; both norms' results; gate and up whole; not what they give, which is made again."""
    kept = dict(saved(*fused_setting()))
    assert kept["gate_proj"] == kept["up_proj"] == 2 * INNER
    assert "gated activation" not in kept and not any(name.startswith("adapter") for name in kept)
    assert [size for name, size in saved(*fused_setting()) if name == "norm"] == [2 * WIDTH, 2 * WIDTH]


def test_a_layer_under_unsloth_by_hand() -> None:
    """Stream, norms, queries, keys, values, output, sum, gate and up: 16 bit each; statistics of norms and softmax."""
    workload, setting = fused_setting()
    sixteen_bit = 6 * WIDTH + 2 * KEYS + 2 * INNER
    found = cost_layer(workload.model.groups[0], setting, "none").kept
    assert found == per_token(2 * sixteen_bit + 2 * 4 + 4 * 32)


@pytest.mark.parametrize(
    ("kernels", "dropout", "buffered"), [("unsloth", 0.0, True), ("unsloth", 0.1, False), ("foak", 0.0, False)]
)
def test_a_buffer_takes_the_place_of_unpacked_matrices_forward(kernels: str, dropout: float, buffered: bool) -> None:
    """Unsloth unpacks into one buffer, without dropout; the backward pass unpacks into tensors of its own."""
    workload, setting = fused_setting(kernels, dropout=dropout)
    assert setting.unpacking_buffer == buffered
    tape, _ = record_layer(workload.model.groups[0], setting)
    (up,) = (op for op in tape.ops if op.name == "up_proj")
    matrix = fixed(2 * WIDTH * INNER)
    assert up.scratch == (fixed(0) if buffered else matrix)
    assert up.grad_scratch == matrix + per_token(2 * INNER)  # beside the inner gradient, which a variable has


def test_dropout_of_fused_adapters_leaves_a_copy() -> None:
    some, none = (dict(saved(*fused_setting("foak", dropout=fraction))) for fraction in (0.1, 0.0))
    assert "adapter dropout" in some and "adapter dropout" not in none

"""What stays in memory from step to step: weights, gradients, optimizer states; and what the optimizer needs to run."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from brim.cost.parameters import (
    adapter_linears,
    count_layer_parameters,
    count_lora_parameters,
    count_parameters,
    default_targets,
    layer_linears,
    target_linears,
)
from brim.cost.setting import DTYPE_BYTES, quantised_bytes
from brim.errors import UnsupportedModel
from brim.spec.model import LayerGroup, Linear, ModelShape, Moe
from brim.spec.recipe import Recipe
from brim.spec.strategy import OptimizerKernel
from brim.tables.read import Optimizer, find_optimizer

_LEAST_PAGED = 100_000  # elements; bitsandbytes pages no smaller tensor
_OWN_LOOPS = ("accelerate", "plain")  # presets that do not run transformers' Trainer
_WIDE_BYTES = 4  # fp32: master weights, what is computed with them, and Adafactor's update
_ORTHOGONAL_BYTES = 2  # bf16, in which Muon orthogonalises whatever the weights are


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes that do not depend on the micro-batch."""

    parameters_bytes: int
    """Weights in their storage dtype, adapters and scales included."""
    trained_parameters: int
    """Elements the optimizer updates."""
    gradients_bytes: int
    """Gradients of all trained weights."""
    optimizer_bytes: int
    """Moments and master weights inside the framework's allocator."""
    paged_bytes: int
    """Optimizer states in managed memory, outside the allocator but on the device while they fit."""


def count_states(shape: ModelShape, recipe: Recipe) -> States:
    """Return weights, gradients and optimizer states of a recipe, bytes.

    Source: each optimizer's row in tables/optimizers.toml; quantised storage in cost/setting.py.
    """
    _refuse_expert_adapters(shape, recipe)
    optimizer = find_optimizer(recipe.optimizer)
    trained, element_bytes = count_trained(shape, recipe), trained_bytes(recipe)
    state_bytes = _optimizer_bytes(shape, recipe, optimizer, trained, stepped_bytes(recipe))
    paged = state_bytes - _resident_bytes(shape, recipe, optimizer, trained) if optimizer.paged else 0
    master = _WIDE_BYTES * trained if recipe.master_weights else 0
    adapters = trained * element_bytes if recipe.lora is not None else 0
    return States(
        parameters_bytes=base_bytes(shape, recipe) + adapters,
        trained_parameters=trained,
        gradients_bytes=trained * gradient_bytes(recipe),
        optimizer_bytes=state_bytes - paged + master,
        paged_bytes=paged,
    )


def _refuse_expert_adapters(shape: ModelShape, recipe: Recipe) -> None:
    """PEFT puts an adapter on every fused expert it reaches: parameters by the billion, and tensors no tape knows."""
    if recipe.lora is None:
        return
    named = target_linears(shape, recipe.lora.target_modules, recipe.engine.fused_experts)
    if adapter_linears(shape, recipe.lora, recipe.engine.fused_experts) != named:
        raise UnsupportedModel(
            model=shape.name, what="adapters on the routed experts",
            advice=f"name other matrices, for example --lora-targets {','.join(default_targets(shape))}",
        )  # fmt: skip


def count_trained(shape: ModelShape, recipe: Recipe) -> int:
    """Return the elements the optimizer updates: all of them, or the adapters'."""
    if recipe.lora is None:
        return count_parameters(shape)
    return count_lora_parameters(shape, recipe.lora, recipe.engine.fused_experts)


def trained_bytes(recipe: Recipe) -> int:
    """Return the bytes of one trained weight: the adapter's dtype, or the model's."""
    return DTYPE_BYTES[recipe.lora.dtype if recipe.lora else recipe.weight_dtype]


def stepped_bytes(recipe: Recipe) -> int:
    """Return the bytes of one weight as the optimizer has it, and of one state: fp32 where it holds master weights.

    Source: megatron/core/optimizer/optimizer.py Float16OptimizerWithFloat16Params; deepspeed runtime/bf16_optimizer.py:
    the optimizer inside is given the fp32 copies, and makes its states from them.
    """
    return _WIDE_BYTES if recipe.master_weights else trained_bytes(recipe)


def gradient_bytes(recipe: Recipe) -> int:
    """Return the bytes of one gradient."""
    return DTYPE_BYTES[recipe.gradient_dtype] if recipe.gradient_dtype else trained_bytes(recipe)


def base_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """Return the bytes of the model's own weights in their storage dtype."""
    element = DTYPE_BYTES[recipe.weight_dtype]
    if recipe.quantization is None:
        return count_parameters(shape) * element
    rest = count_parameters(shape)
    packed = 0
    for group in shape.groups:
        for linear, copies in quantised_linears(group, recipe.engine.fused_experts):
            rest -= group.count * copies * linear.num_weights
            packed += group.count * copies * quantised_bytes(linear, recipe.quantization)
    upcast = 4 if recipe.quantization.upcast_rest else element
    # PEFT's upcast reaches every 16-bit parameter, fused experts too.
    return packed + rest * upcast - _narrowed_elements(shape, recipe) * (upcast - element)


def _narrowed_elements(shape: ModelShape, recipe: Recipe) -> int:
    """Return the elements of embeddings and head that are cast back to 16 bit.

    Source: trl 0.13 trainer/utils.py peft_module_casting_to_bf16.
    """
    if recipe.quantization is None or not recipe.quantization.narrow_embeddings:
        return 0
    head = 0 if shape.tie_word_embeddings else sum(linear.num_parameters for linear in shape.head)
    return head + sum(table.num_parameters for table in shape.embeddings)


def quantised_linears(group: LayerGroup, fused_experts: bool) -> tuple[tuple[Linear, int], ...]:
    """Return the matrices of a layer that quantised loading replaces, and their copies.

    Source: transformers integrations/bitsandbytes.py replaces every nn.Linear but the output embedding.
    """
    return target_linears(group, ("all-linear",), fused_experts)


def _optimizer_bytes(shape: ModelShape, recipe: Recipe, optimizer: Optimizer, trained: int, element: int) -> int:
    if optimizer.factored:
        return 4 * _factored_elements(shape, recipe)
    if optimizer.min_quantised:
        return _quantised_states(optimizer, trained, _fp32_elements(shape, recipe, optimizer))
    if optimizer.state_bytes:
        return math.ceil(trained * optimizer.state_bytes)
    if optimizer.vector_state_of_parameter is not None:
        vectors = trained - _matrix_elements(shape, recipe)
        return element * (trained + vectors * (optimizer.vector_state_of_parameter - 1))
    return trained * element * optimizer.state_of_parameter


def _quantised_states(optimizer: Optimizer, elements: int, in_fp32: int) -> int:
    """Return 8-bit states with their scales, of some elements fp32 states instead, bytes."""
    scaled = math.ceil((elements - in_fp32) * (optimizer.state_bytes + optimizer.block_bytes))
    return scaled + in_fp32 * 4 * math.ceil(optimizer.state_bytes)


def _resident_bytes(shape: ModelShape, recipe: Recipe, optimizer: Optimizer, trained: int) -> int:
    """Return the states of a paged optimizer that are not paged: those of small tensors, and all scales.

    Source: bitsandbytes optim/optimizer.py get_state_buffer.
    """
    small = _small_elements(shape, recipe, _LEAST_PAGED)
    if not optimizer.min_quantised:
        return math.ceil(small * optimizer.state_bytes)
    smallest = _small_elements(shape, recipe, optimizer.min_quantised)
    tables = _fp32_tables(shape, recipe, optimizer)
    paged_tables = sum(count for count in tables if count >= _LEAST_PAGED)
    in_fp32 = smallest + sum(tables) - paged_tables
    return _quantised_states(optimizer, small, in_fp32) + math.ceil(
        (trained - small - paged_tables) * optimizer.block_bytes
    )


def _fp32_elements(shape: ModelShape, recipe: Recipe, optimizer: Optimizer) -> int:
    """Return the elements with fp32 states under an 8-bit optimizer: small tensors, in HF's Trainer tables too."""
    small = _small_elements(shape, recipe, optimizer.min_quantised)
    return small + sum(_fp32_tables(shape, recipe, optimizer))


def _fp32_tables(shape: ModelShape, recipe: Recipe, optimizer: Optimizer) -> list[int]:
    """Return the elements of lookup tables, small ones apart, that keep fp32 states.

    Source: transformers trainer.py create_optimizer registers `optim_bits` 32 for every nn.Embedding.
    """
    if recipe.lora is not None or recipe.engine.name.startswith(_OWN_LOOPS):
        return []
    counts = [table.num_parameters for table in shape.embeddings]
    return [count for count in counts if count >= optimizer.min_quantised]


def trained_matrices(shape: ModelShape, recipe: Recipe) -> list[tuple[int, int, int]]:
    """Return (rows, columns, copies) of every trained matrix, embeddings apart."""
    if recipe.lora is not None:
        hit = target_linears(shape, recipe.lora.target_modules, recipe.engine.fused_experts)
        r = recipe.lora.r
        return [shape_ for linear, n in hit for shape_ in ((r, linear.in_features, n), (linear.out_features, r, n))]
    return [
        (linear.out_features, linear.in_features, group.count * copies)
        for group in shape.groups
        for linear, copies in layer_linears(group)
    ]


def _embedding_matrices(shape: ModelShape, recipe: Recipe) -> list[tuple[int, int, int]]:
    if recipe.lora is not None:
        return []
    tables = [(table.num_embeddings, table.embedding_dim, 1) for table in shape.embeddings]
    head = [] if shape.tie_word_embeddings else [(out.out_features, out.in_features, 1) for out in shape.head[-1:]]
    return tables + head


def _factored_elements(shape: ModelShape, recipe: Recipe) -> int:
    """Row and column means of every matrix, and a full second moment of every vector."""
    matrices = trained_matrices(shape, recipe) + _embedding_matrices(shape, recipe)
    inside = sum(rows * columns * copies for rows, columns, copies in matrices)
    return sum((rows + columns) * copies for rows, columns, copies in matrices) + max(
        0, count_trained(shape, recipe) - inside
    )


def _matrix_elements(shape: ModelShape, recipe: Recipe) -> int:
    return sum(rows * columns * copies for rows, columns, copies in _hidden_matrices(shape, recipe))


def _hidden_matrices(shape: ModelShape, recipe: Recipe) -> list[tuple[int, int, int]]:
    """Return (rows, columns, copies) of what Muon updates: matrices in the layers, fused experts apart.

    Source: torch/optim/_muon.py __init__ takes two-dimensional parameters only; fused experts have three.
    """
    matrices = trained_matrices(shape, recipe)
    if recipe.lora is not None or not recipe.engine.fused_experts:
        return matrices
    experts = [
        (linear.out_features, linear.in_features, group.count * group.mlp.num_experts)
        for group in shape.groups
        if isinstance(group.mlp, Moe)
        for linear in group.mlp.expert_linears
    ]
    return list((Counter(matrices) - Counter(experts)).elements())


def _small_elements(shape: ModelShape, recipe: Recipe, limit: int) -> int:
    """Elements of tensors below the size at which 8-bit optimizers quantise: norms, biases, small adapters."""
    matrices = trained_matrices(shape, recipe) + _embedding_matrices(shape, recipe)
    large = sum(rows * columns * copies for rows, columns, copies in matrices if rows * columns >= limit)
    vectors = [group for group in shape.groups if group.hidden_size >= limit] if recipe.lora is None else []
    large += sum(group.count * group.num_norms * group.hidden_size for group in vectors)
    return max(0, count_trained(shape, recipe) - large)


def largest_trained_tensor(shape: ModelShape, recipe: Recipe) -> int:
    """Return the elements of the largest tensor the optimizer updates (fused experts are one tensor)."""
    matrices = trained_matrices(shape, recipe) + _embedding_matrices(shape, recipe)
    largest = max((rows * columns for rows, columns, _ in matrices), default=0)
    if recipe.lora is None and recipe.engine.fused_experts:
        largest = max([largest, *(_largest_fused_expert(group) for group in shape.groups)])
    return largest


def _largest_fused_expert(group: LayerGroup) -> int:
    if not isinstance(group.mlp, Moe):
        return 0
    return group.mlp.num_experts * max(linear.num_weights for linear in group.mlp.expert_linears)


def step_temporaries_bytes(shape: ModelShape, recipe: Recipe, kernel: OptimizerKernel) -> int:
    """Return what the optimizer allocates while it steps, beyond the gradients that are there, bytes.

    With master weights all gradients are widened first, and the narrow ones freed.

    Source: tables/optimizers.toml; foreach kernels hold copies of every trained tensor at once, loops of the
    largest tensor only, fused kernels none; megatron/core/optimizer/optimizer.py _copy_model_grads_to_main_grads.
    """
    widened = 0
    if recipe.master_weights:
        widened = max(0, _WIDE_BYTES - gradient_bytes(recipe)) * count_trained(shape, recipe)
    return widened + _kernel_temporaries(shape, recipe, kernel)


def _kernel_temporaries(shape: ModelShape, recipe: Recipe, kernel: OptimizerKernel) -> int:
    optimizer, element = find_optimizer(recipe.optimizer), stepped_bytes(recipe)
    kernel = kernel if kernel in optimizer.kernels else optimizer.kernels[0]  # type: ignore[assignment]
    if kernel == "foreach":
        return optimizer.foreach_temporary_copies * count_trained(shape, recipe) * element
    if kernel != "loop":
        return 0
    if optimizer.vector_state_of_parameter is not None:
        apart = optimizer.loop_temporary_largest * _largest_apart(shape, recipe) * element
        return max(apart, _orthogonal_temporaries(shape, recipe))
    largest = largest_trained_tensor(shape, recipe)
    if optimizer.factored:
        return (optimizer.loop_temporary_largest + _widened_copies(recipe)) * largest * _WIDE_BYTES
    return optimizer.loop_temporary_largest * largest * element


def _widened_copies(recipe: Recipe) -> int:
    """Return which of weight and gradient Adafactor needs a copy of in fp32: the 16-bit ones.

    Source: transformers/optimization.py Adafactor.step.
    """
    gradient = _WIDE_BYTES if recipe.master_weights else gradient_bytes(recipe)
    return sum(size_bytes < _WIDE_BYTES for size_bytes in (gradient, stepped_bytes(recipe)))


def _orthogonal_temporaries(shape: ModelShape, recipe: Recipe) -> int:
    """Return what Muon holds of one matrix: its update, and in bf16 two iterates, their Gram matrix and its polynomial.

    Source: torch/optim/_muon.py 2.13 _single_tensor_muon, _zeropower_via_newtonschulz.
    """
    sizes = (
        stepped_bytes(recipe) * rows * columns
        + _ORTHOGONAL_BYTES * 2 * (rows * columns + min(rows, columns) ** 2)
        for rows, columns, _ in _hidden_matrices(shape, recipe)
    )
    return max(sizes, default=0)


def _largest_apart(shape: ModelShape, recipe: Recipe) -> int:
    """Return the elements of the largest tensor that Muon leaves to AdamW: embedding, head, or fused experts."""
    tables = [rows * columns for rows, columns, _ in _embedding_matrices(shape, recipe)]
    experts = [_largest_fused_expert(group) for group in shape.groups]
    return max([0, *tables, *(experts if recipe.lora is None and recipe.engine.fused_experts else [])])


def layer_gradient_bytes(group: LayerGroup, recipe: Recipe) -> int:
    """Return the gradients one layer adds during backward, bytes."""
    if recipe.lora is None:
        elements = count_layer_parameters(group)
    else:
        elements = sum(
            copies * recipe.lora.r * (linear.in_features + linear.out_features)
            for linear, copies in target_linears(group, recipe.lora.target_modules, recipe.engine.fused_experts)
        )
    return elements * gradient_bytes(recipe)

"""The storages that weights and gradients lie in, tensor by tensor: what the caching allocator is asked for."""

from __future__ import annotations

from collections.abc import Iterator

from brim.cost.parameters import layer_linears, target_linears
from brim.cost.setting import DTYPE_BYTES, quantised_bytes
from brim.cost.states import States, quantised_linears, trained_bytes
from brim.spec.model import LayerGroup, Linear, ModelShape, Moe
from brim.spec.recipe import Quantization, Recipe


def list_weights(shape: ModelShape, recipe: Recipe, states: States) -> list[int]:
    """Return the storages of all weights, bytes each; norms, biases and the like are one at the end."""
    sizes = [*_outer(shape, _outer_bytes(recipe))]
    for group in shape.groups:
        sizes += [*_layer_weights(group, recipe)] * group.count
        if recipe.lora is not None:
            sizes += [*_layer_trained(group, recipe, trained_bytes(recipe))] * group.count
    return _complete(sizes, states.parameters_bytes)


def list_layer_gradients(group: LayerGroup, recipe: Recipe) -> tuple[int, ...]:
    """Return the gradients of one layer's trained matrices in order of the forward pass, bytes each."""
    return tuple(_layer_trained(group, recipe, gradient_bytes(recipe)))


def list_outer_gradients(shape: ModelShape, recipe: Recipe, states: States) -> tuple[list[int], list[int]]:
    """Return the gradients outside the layers, bytes each: of the head, made first, and the rest, made last."""
    inside = sum(group.count * sum(list_layer_gradients(group, recipe)) for group in shape.groups)
    if recipe.lora is not None:
        return [], _complete([], states.gradients_bytes - inside)
    element = gradient_bytes(recipe)
    head = [linear.num_parameters * element for linear in shape.head[-1:]]
    tables = [table.num_parameters * element for table in shape.embeddings]
    if shape.tie_word_embeddings:
        tables = tables[1:]
    return head, _complete(tables, states.gradients_bytes - inside - sum(head))


def gradient_bytes(recipe: Recipe) -> int:
    """Return the bytes of an element of a gradient."""
    return DTYPE_BYTES[recipe.gradient_dtype] if recipe.gradient_dtype else trained_bytes(recipe)


def _complete(sizes: list[int], total: int) -> list[int]:
    rest = total - sum(sizes)
    return [*sizes, rest] if rest > 0 else sizes


def _unquantised_bytes(recipe: Recipe) -> int:
    upcast = recipe.quantization is not None and recipe.quantization.upcast_rest
    return 4 if upcast else DTYPE_BYTES[recipe.weight_dtype]


def _outer_bytes(recipe: Recipe) -> int:
    narrow = recipe.quantization is not None and recipe.quantization.narrow_embeddings
    return DTYPE_BYTES[recipe.weight_dtype] if narrow else _unquantised_bytes(recipe)


def _outer(shape: ModelShape, element: int) -> Iterator[int]:
    yield from (table.num_parameters * element for table in shape.embeddings)
    if not shape.tie_word_embeddings:
        yield from (linear.num_parameters * element for linear in shape.head)


def _layer_weights(group: LayerGroup, recipe: Recipe) -> Iterator[int]:
    """Yield the matrices of one layer; experts that are one parameter are one storage."""
    element, fused = _unquantised_bytes(recipe), recipe.engine.fused_experts
    if recipe.quantization is None:
        for linear, copies in layer_linears(group):
            yield from _of_copies(linear.num_weights * element, copies, fused)
        return
    for linear, copies in quantised_linears(group, fused):
        yield from _quantised(linear, copies, recipe.quantization)
    if fused and isinstance(group.mlp, Moe):
        yield from (linear.num_weights * group.mlp.num_experts * element for linear in group.mlp.expert_linears)


def _quantised(linear: Linear, copies: int, quantization: Quantization) -> list[int]:
    """Return the packed weights, and the scales of all copies as one: they are small."""
    packed = linear.num_weights if quantization.kind in ("int8", "fp8") else -(-linear.num_weights // 2)
    return [*[packed] * copies, copies * (quantised_bytes(linear, quantization) - packed)]


def _layer_trained(group: LayerGroup, recipe: Recipe, element: int) -> Iterator[int]:
    if recipe.lora is None:
        for linear, copies in layer_linears(group):
            yield linear.num_weights * copies * element
        return
    for linear, copies in target_linears(group, recipe.lora.target_modules, recipe.engine.fused_experts):
        yield recipe.lora.r * linear.in_features * copies * element
        yield recipe.lora.r * linear.out_features * copies * element


def _of_copies(size_bytes: int, copies: int, fused: bool) -> list[int]:
    return [size_bytes * copies] if fused else [size_bytes] * copies

"""Reserved memory: the step's allocations, as the tapes give them, replayed through the caching allocator.

Leaves out: tensors of varying length (each length leaves blocks of its own size: see the data issue's sequences).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from brim.cost.allocator import CachingAllocator
from brim.cost.blocks import Block, cost_head, cost_layer
from brim.cost.overhead import workspace_bytes
from brim.cost.parameters import layer_linears
from brim.cost.setting import DTYPE_BYTES, quantised_bytes, read_setting
from brim.cost.states import count_states, quantised_linears, step_temporaries_bytes, trained_bytes
from brim.cost.tape import Event
from brim.spec.model import LayerGroup, Moe
from brim.spec.recipe import Recipe
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.units import MIB

_STEPS = 2  # the second optimizer step runs with states in place and a pool already cut up
_MICRO_BATCHES = 2  # more micro-batches repeat the second


class _Replay:
    """One process: weights first, then steps; every storage of the tapes passes through the allocator."""

    def __init__(self, workload: Workload, strategy: Strategy) -> None:
        self.workload, self.strategy, self.shape = workload, strategy, workload.model
        self.tokens = strategy.micro_batch_size * (self.shape.sequence_tokens or workload.data.seq_len)
        device = workload.cluster.device
        self.allocator = CachingAllocator(capacity_bytes=device.plannable_bytes)
        self.keys = count(1)
        setting, engine = read_setting(workload, strategy), workload.recipe.engine
        mode = strategy.activation_checkpointing
        self.layers = [
            (group, cost_layer(group, setting, mode, engine.reentrant_checkpointing)) for group in self.shape.groups
        ]
        self.head = cost_head(self.shape, setting, engine, strategy.loss_kernel)
        self.checkpointed = mode != "none"

    def run(self) -> int:
        self._load()
        for _ in range(_STEPS):
            self._step()
        return self.allocator.peak_reserved_bytes

    def _hold(self, size_bytes: int) -> int:
        key = next(self.keys)
        if size_bytes > 0:
            self.allocator.allocate(key, size_bytes)
        return key if size_bytes > 0 else 0

    def _drop(self, keys: list[int]) -> None:
        for key in keys:
            if key:
                self.allocator.free(key)
        keys.clear()

    def _load(self) -> None:
        recipe = self.workload.recipe
        for size_bytes in _weights(self.workload):
            self._hold(size_bytes)
        self._hold(workspace_bytes(self.workload.cluster.device))
        self.states: list[int] = []
        self.gradients: list[int] = []
        self.recipe: Recipe = recipe

    def _step(self) -> None:
        accumulates = self.strategy.gradient_accumulation_steps > 1
        for _ in range(_MICRO_BATCHES if accumulates else 1):
            self._micro_batch()
        self._optimizer()
        if self.recipe.engine.set_to_none:
            self._drop(self.gradients)

    def _micro_batch(self) -> None:
        kept: list[tuple[Block, dict[int, int], list[int]]] = []
        stream = 0
        for group, block in self.layers:
            for _ in range(group.count):
                live: dict[int, int] = {}
                held = [self._hold(block.kept.at(self.tokens))] if self.checkpointed else []
                events = block.evaluation_events if self.checkpointed else block.forward_events
                self._play(events, live)
                if self.checkpointed:
                    self._drop(list(live.values()))
                    live = {}
                kept.append((block, live, held))
        live: dict[int, int] = {}
        self._play(self.head.forward_events, live)
        self._play(self.head.backward_events, live)
        self._drop(list(live.values()))
        gradient = [self._hold(self.head.stream.at(self.tokens))]
        for block, live, held in reversed(kept):
            if self.checkpointed:
                self._play(block.forward_events, live)
            self._play(block.backward_events, live)
            following = [self._hold(block.stream.at(self.tokens))]
            self._drop(list(live.values()))
            self._drop(gradient)
            self._drop(held)
            gradient = following
        self._drop(gradient)
        self._make_gradients()
        del stream

    def _play(self, events: tuple[Event, ...], live: dict[int, int]) -> None:
        for event in events:
            if event.allocates:
                live[event.key] = self._hold(event.size.at(self.tokens))
            else:
                self._drop([live.pop(event.key, 0)])

    def _make_gradients(self) -> None:
        if not self.gradients:
            self.gradients = [self._hold(size) for size in _trained(self.workload)]

    def _optimizer(self) -> None:
        states = count_states(self.shape, self.recipe)
        if not self.states and states.optimizer_bytes:
            total = sum(_trained(self.workload)) or 1
            self.states = [
                self._hold(size * states.optimizer_bytes // total // 2)
                for size in _trained(self.workload)
                for _ in range(2)
            ]
        temporary = step_temporaries_bytes(self.shape, self.recipe, self.strategy.optimizer_kernel)
        total = sum(_trained(self.workload)) or 1
        if self.strategy.optimizer_kernel == "foreach" and temporary:
            self._drop([self._hold(size * temporary // total) for size in _trained(self.workload)])
        elif temporary:
            self._drop([self._hold(temporary)])


def _weights(workload: Workload) -> Iterator[int]:
    """Storages of the model's weights, bytes."""
    recipe, shape = workload.recipe, workload.model
    element = DTYPE_BYTES[recipe.weight_dtype]
    for table in shape.embeddings:
        yield table.num_parameters * element
    if not shape.tie_word_embeddings:
        yield from (linear.num_parameters * element for linear in shape.head)
    for group in shape.groups:
        for _ in range(group.count):
            yield from _layer_weights(group, recipe, element)
    if recipe.lora is not None:
        yield from _trained(workload)


def _layer_weights(group: LayerGroup, recipe: Recipe, element: int) -> Iterator[int]:
    fused = recipe.engine.fused_experts
    if recipe.quantization is None:
        for linear, copies in layer_linears(group):
            yield from [linear.num_weights * copies * element] if fused else [linear.num_weights * element] * copies
        return
    for linear, copies in quantised_linears(group, fused):
        yield from [quantised_bytes(linear, recipe.quantization)] * copies
    if fused and isinstance(group.mlp, Moe):
        yield from (linear.num_weights * group.mlp.num_experts * element for linear in group.mlp.expert_linears)


def _trained(workload: Workload) -> list[int]:
    """Storages of the gradients, bytes: one per trained tensor."""
    recipe, shape = workload.recipe, workload.model
    element = trained_bytes(recipe)
    if recipe.lora is None:
        return list(_weights_only(workload, element))
    states = count_states(shape, recipe)
    pieces = max(1, 2 * sum(group.count * max(1, len(group.attention.linears)) for group in shape.groups))
    return [states.gradients_bytes // pieces] * pieces


def _weights_only(workload: Workload, element: int) -> Iterator[int]:
    shape = workload.model
    for table in shape.embeddings:
        yield table.num_parameters * element
    if not shape.tie_word_embeddings:
        yield from (linear.num_parameters * element for linear in shape.head)
    for group in shape.groups:
        for _ in range(group.count):
            yield from (linear.num_weights * copies * element for linear, copies in layer_linears(group))


def estimate_reserved(workload: Workload, strategy: Strategy) -> int:
    """Return the bytes the allocator would hold at its peak, fragmentation included."""
    return _Replay(workload, strategy).run() + 2 * MIB

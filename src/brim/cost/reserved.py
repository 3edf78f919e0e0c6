"""Reserved memory: the step's allocations, as the tapes give them, replayed through the caching allocator.

Every forward pass runs whole, since what it keeps decides how the pool is cut. A backward pass gives back: the first
and last layers of each kind stand for the others, unless gradients are made that come to lie in between. Of many
frozen experts that run one after the other some run, the others hold what they keep. `folded=False` runs everything;
the difference is below 0.8 % (tests/cost/test_reserved.py; with eager attention's huge blocks up to 3 %, with experts
in a loop and a single short sequence up to 2 %).

Leaves out: tensors of varying length (each length leaves blocks of its own size: see the data issue's sequences),
evaluation, and what loading the weights leaves in the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd
from typing import NamedTuple

from brim.cost.allocator import CachingAllocator
from brim.cost.blocks import Block, cost_head, cost_layer
from brim.cost.embeddings import kept_by_embeddings
from brim.cost.overhead import context_bytes, held_logits, input_bytes, unpacking_bytes, workspace_bytes
from brim.cost.scripts import Act, Player, Script, find_last_large, write_script
from brim.cost.setting import Setting, read_setting
from brim.cost.states import States, count_states, largest_trained_tensor, step_temporaries_bytes
from brim.cost.storages import gradient_bytes, list_layer_gradients, list_outer_gradients, list_weights
from brim.spec.model import LayerGroup, Moe
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.units import MIB

_STEPS = 2  # the second optimizer step runs with states in place and a pool already cut up
_MICRO_BATCHES = 2  # more micro-batches repeat the second
_WHOLE_LAYERS = 4  # of a kind, at either end, that run backward whole
_LOOPED_EXPERTS = 16  # of a loop, that run
_BASELINE_BYTES = 2 * MIB  # a process reserves one small segment before the model comes


def estimate_reserved(workload: Workload, strategy: Strategy) -> int:
    """Return the bytes the allocator would hold at its peak, fragmentation included."""
    return replay(workload, strategy).peak_reserved_bytes + _BASELINE_BYTES


def replay(workload: Workload, strategy: Strategy, *, folded: bool = True) -> CachingAllocator:
    """Return the allocator of a process that has loaded the weights and made two optimizer steps.

    Args:
        workload: the job.
        strategy: how it is run.
        folded: whether repeated layers and experts run a few times only.
    """
    job = _Job(workload, strategy, read_setting(workload, strategy))
    process, accumulates = _Process(job, folded), strategy.gradient_accumulation_steps > 1
    brief = folded and accumulates and not job.setting.trains_base
    for _ in range(_STEPS):
        for _ in range(_MICRO_BATCHES if accumulates and not brief else 1):
            process.run_micro_batch()
        process.run_optimizer(keeps_gradients=brief)
    return process.player


class _Job(NamedTuple):
    workload: Workload
    strategy: Strategy
    setting: Setting

    @property
    def tokens(self) -> int:
        return self.strategy.micro_batch_size * self.setting.seq_len

    @property
    def checkpointed(self) -> bool:
        return self.strategy.activation_checkpointing != "none"


class _Kind(NamedTuple):
    """What each layer of a group asks for."""

    script: Script
    rest: tuple[int, ...]
    """What each expert that does not run keeps, bytes."""
    beside: tuple[int, ...]
    """What checkpointing keeps beside the input: attention outputs if selective, what hangs on the graph; bytes."""
    cached: tuple[int, ...]
    """16-bit weights that autocast keeps until the forward pass ends, bytes each."""
    gradients: tuple[int, ...]
    """Gradients of its weights, bytes each."""
    reentrant: bool
    """Whether a checkpoint holds the output while it goes back."""


def _read_kind(group: LayerGroup, job: _Job, folded: bool) -> _Kind:
    mode, setting, recipe = job.strategy.activation_checkpointing, job.setting, job.workload.recipe
    reentrant = recipe.engine.reentrant_checkpointing
    block = part = cost_layer(group, setting, mode, reentrant)
    rest: tuple[int, ...] = ()
    if folded and isinstance(group.mlp, Moe) and not setting.fused_experts and not setting.trains_base:
        fewer = _with_fewer_experts(group.mlp)
        part = cost_layer(replace(group, mlp=fewer), setting, mode, reentrant)
        idle = group.mlp.num_experts - fewer.num_experts
        rest = ((_count_left(block, job.tokens) - _count_left(part, job.tokens)) // max(1, idle),) * idle
    return _Kind(
        script=write_script(part, job.tokens), rest=rest,
        beside=_list_beside(block, job),
        cached=tuple(copy.at(job.tokens) for copy in block.copies) if job.checkpointed else (),
        gradients=list_layer_gradients(group, recipe),
        reentrant=reentrant,
    )  # fmt: skip


def _list_beside(block: Block, job: _Job) -> tuple[int, ...]:
    """Return what checkpointing keeps beside the input of a layer, bytes; nothing without it."""
    if not job.checkpointed:
        return ()
    attention = block.attention_kept.at(job.tokens) if job.strategy.activation_checkpointing == "selective" else 0
    return attention, *(size.at(job.tokens) for size in block.hanging)


def _with_fewer_experts(moe: Moe) -> Moe:
    """Return a part of the experts, each visited by as many tokens as before."""
    common = gcd(moe.num_experts, moe.num_experts_per_tok)
    factors = [factor for factor in range(1, common + 1) if common % factor == 0]
    factor = next((factor for factor in factors if moe.num_experts // factor <= _LOOPED_EXPERTS), common)
    return replace(moe, num_experts=moe.num_experts // factor, num_experts_per_tok=moe.num_experts_per_tok // factor)


def _count_left(block: Block, tokens: int) -> int:
    """Return what a forward pass that records leaves behind, output included, bytes."""
    sizes = ((event.allocates, event.size.at(tokens)) for event in block.forward_events)
    return sum(size if allocates else -size for allocates, size in sizes)


class _Layer:
    """A layer that keeps its tensors until the backward pass."""

    def __init__(self, kind: _Kind, player: Player, *, skippable: bool, offloaded: bool) -> None:
        self.kind, self.script, self.player = kind, kind.script, player
        self.skippable, self.offloaded = skippable, offloaded
        self.base = 0
        self.extra: list[int] = []

    def run_forward(self, stream: int) -> int:
        """Take the input over and return the output."""
        script, player = self.script, self.player
        self.base = player.name(script)
        given = _receive(player, script, self.base, stream)
        player.play(script.forward, self.base)
        self.extra = player.hold(*self.kind.rest)
        player.drop(given)
        if self.offloaded:
            self.release()
        return self.base + script.output[0]

    def prepare(self) -> list[int]:
        """Make what the backward pass needs; return what it leaves over."""
        if self.offloaded:
            self.player.play(self._list_kept(), self.base)
            self.extra = self.player.hold(*self.kind.rest)
        return self.extra

    def run_backward(self, gradient: int, gradients: tuple[int, ...]) -> tuple[int, list[int]]:
        """Take the gradient of the output over; return that of the input, and those of the weights."""
        script, player, left = self.script, self.player, self.prepare()
        player.rename(gradient, self.base + script.gradient[0])
        made = player.play_among(script.backward, self.base, gradients)
        player.drop(left)
        return self.base + script.stream_gradient, made

    def skip_backward(self, gradient: int, gradients: tuple[int, ...]) -> tuple[int, list[int]]:
        """Give back what is kept; the gradient passes through."""
        if not self.offloaded:
            self.release()
        return gradient, self.player.hold(*gradients)

    def release(self) -> None:
        """Give back what is kept."""
        self.player.play([(number, 0) for number, _ in self._list_kept()], self.base)
        self.player.drop(self.extra)

    def _list_kept(self) -> list[Act]:
        stream = self.script.stream
        return [*self.script.kept, *([(stream, self.script.stream_bytes)] if stream is not None else [])]


class _Checkpointed(_Layer):
    """A layer that keeps its input and runs again before its backward pass."""

    def run_forward(self, stream: int) -> int:
        """Keep the input and return the output."""
        script, player = self.script, self.player
        base = player.name(script)
        player.play(script.evaluation, base)
        self.extra = [stream, *player.hold(*self.kind.beside)]
        if self.offloaded:
            self.release()
        return base + script.evaluation_output[0]

    def prepare(self) -> list[int]:
        """Run again; return what the backward pass leaves over."""
        script, player = self.script, self.player
        stream, *beside = self.extra or player.hold(script.stream_bytes)
        player.drop(beside)
        self.base = player.name(script)
        given = _receive(player, script, self.base, stream)
        player.play(script.forward, self.base)
        output = [self.base + script.output[0]]
        if self.kind.reentrant:  # it runs to its end and holds the output
            given += output
        else:
            player.drop(output)
        return given + player.hold(*self.kind.rest)

    def release(self) -> None:
        """Give back what is kept."""
        self.player.drop(self.extra)


def _receive(player: Player, script: Script, base: int, stream: int) -> list[int]:
    """Hand a block its input; return it if the block does not release it itself."""
    if script.stream is None:
        return [stream]
    player.rename(stream, base + script.stream)
    return []


def _list_layers(job: _Job, player: Player, folded: bool) -> Iterator[_Layer]:
    """Yield every layer in order; those of a group share a script."""
    groups, offloaded = job.workload.model.groups, job.strategy.activation_offload
    kinds = {group: _read_kind(group, job, folded) for group in groups}
    alike = {group: replace(group, count=1) for group in groups}
    total, seen = dict.fromkeys(alike.values(), 0), dict.fromkeys(alike.values(), 0)
    for group in groups:
        total[alike[group]] += group.count
    for group in groups:
        kind = alike[group]
        for index in range(seen[kind], seen[kind] + group.count):
            skippable = folded and _WHOLE_LAYERS <= index < total[kind] - _WHOLE_LAYERS
            make = _Checkpointed if job.checkpointed else _Layer
            yield make(kinds[group], player, skippable=skippable, offloaded=offloaded)
        seen[kind] += group.count


class _Process:
    """A training process; every storage of its tapes passes through the player."""

    def __init__(self, job: _Job, folded: bool) -> None:
        shape, recipe, device = job.workload.model, job.workload.recipe, job.workload.cluster.device
        self.job, self.shape, self.recipe = job, shape, recipe
        self.player = Player(
            capacity_bytes=device.plannable_bytes - context_bytes(device),
            expandable=job.strategy.allocator == "expandable_segments",
        )
        self.states: States = count_states(shape, recipe)
        self.layers = list(_list_layers(job, self.player, folded))
        head = cost_head(shape, job.setting, recipe.engine, job.strategy.loss_kernel)
        self.head = write_script(head, job.tokens)
        self.gradient_sizes = list_outer_gradients(shape, recipe, self.states)
        self.tied = shape.tie_word_embeddings and bool(shape.head) and job.setting.trains_base
        # Gradients from the pool of the activations come to lie between them and cut it up.
        self.cuts = largest_trained_tensor(shape, recipe) * gradient_bytes(recipe) > MIB
        self.gradients: list[int] = []
        self.moments: list[int] = []
        lasting = workspace_bytes(device), unpacking_bytes(shape, job.setting)
        self.player.hold(*list_weights(shape, recipe, self.states), *lasting)

    def run_micro_batch(self) -> None:
        """Forward, loss and backward pass of one micro-batch."""
        player, job, made = self.player, self.job, self.gradients
        head, tail = ((), ()) if made else self.gradient_sizes
        if self.tied:  # the output's part is made each time, and waits for the embedding's
            head = self.gradient_sizes[0]
        kept = kept_by_embeddings(self.shape, job.setting).at(job.tokens)
        inputs = player.hold(input_bytes(job.setting).at(job.tokens), kept)
        (stream,) = player.hold((self.layers[0].script if self.layers else self.head).stream_bytes)
        cached: list[int] = []
        for layer in self.layers:
            stream = layer.run_forward(stream)
            cached += player.hold(*layer.kind.cached)
        gradient, fresh = self._run_head(stream, cached, head)
        held = player.hold(held_logits(job.workload, job.strategy, job.setting).at(job.tokens))
        for layer in reversed(self.layers):
            run = layer.skip_backward if layer.skippable and (made or not self.cuts) else layer.run_backward
            gradient, more = run(gradient, () if made else layer.kind.gradients)
            fresh += more
        if self.tied:  # neither part can take the sum: one is a view, the other came last
            table, total = player.hold(*self.gradient_sizes[0]), player.hold(*self.gradient_sizes[0])
            player.drop(table + fresh[: len(total)])
            fresh[: len(total)] = total
        if made:
            player.drop(fresh)
        self.gradients = made + fresh + player.hold(*tail)
        player.drop([gradient, *held, *inputs])

    def _run_head(self, stream: int, cached: list[int], gradients: tuple[int, ...]) -> tuple[int, list[int]]:
        player, script = self.player, self.head
        base = player.name(script)
        given = _receive(player, script, base, stream)
        player.play(script.forward, base)
        player.drop(given + cached)
        player.free(base + script.output[0])
        player.play([script.gradient], base)
        # The output matrix gets its gradient while that of the logits is there.
        split = find_last_large(script)
        player.play(script.backward[:split], base)
        made = player.hold(*gradients)
        player.play(script.backward[split:], base)
        return base + script.stream_gradient, made

    def run_optimizer(self, *, keeps_gradients: bool) -> None:
        """Optimizer step: states are made in the first, temporaries in each; gradients go if the loop lets them."""
        player, kernel = self.player, self.job.strategy.optimizer_kernel
        sizes = [size for layer in self.layers for size in layer.kind.gradients]
        sizes += [size for part in self.gradient_sizes for size in part]
        total = sum(sizes) or 1
        if not self.moments:
            half = self.states.optimizer_bytes / total / 2
            self.moments = player.hold(*(round(size * half) for size in sizes for _ in range(2)))
        temporary = step_temporaries_bytes(self.shape, self.recipe, kernel)
        pieces = sizes if kernel == "foreach" else [total]
        player.drop(player.hold(*(size * temporary // total for size in pieces)))
        if self.recipe.engine.set_to_none and not keeps_gradients:
            player.drop(self.gradients)

"""The formula: every moment of a training step, tensor by tensor, from the numbers of the architecture.

A step is followed through its moments: forward pass, loss, loss backward, backward of each group of layers,
optimizer step, evaluation, saving. Each is affine in the tokens of the micro-batch, so a workload is profiled
once per combination of kernels and every micro-batch size is then two multiplications.

Leaves out: fragmentation (in `reserved`), what user callbacks allocate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from brim.cost.blocks import Block, cost_head, cost_layer
from brim.cost.calibration import margin_bytes
from brim.cost.embeddings import kept_by_embeddings
from brim.cost.ledger import Estimate, Ledger, Moment
from brim.cost.overhead import context_bytes, held_logits, input_bytes, unpacking_bytes, workspace_bytes
from brim.cost.setting import Setting, is_flattened, is_masked, read_setting
from brim.cost.states import States, count_states, layer_gradient_bytes, step_temporaries_bytes
from brim.cost.tape import ZERO, Instant, Size, fixed, per_token
from brim.spec.model import LayerGroup
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload


class Rows(NamedTuple):
    """One candidate for the highest point of a moment, as affine ledger rows."""

    name: str
    gradients: Size
    optimizer_states: Size
    activations: Size
    temporaries: Size

    @property
    def total(self) -> Size:
        return self.gradients + self.optimizer_states + self.activations + self.temporaries


class Profile(NamedTuple):
    """A workload under one combination of kernels: everything but the micro-batch size."""

    parameters_bytes: int
    overhead_bytes: int
    communication_bytes: int
    paged_bytes: int
    inputs: Size
    rows: tuple[Rows, ...]
    totals: tuple[tuple[int, int], ...]
    """(fixed, per token) bytes of each candidate, parameters and overhead included, dominated ones dropped."""


class _Parts(NamedTuple):
    workload: Workload
    strategy: Strategy
    setting: Setting
    states: States
    layers: tuple[tuple[LayerGroup, Block], ...]
    head: Block

    @property
    def lasting_gradients(self) -> int:
        """Gradients that outlive the optimizer step, zeroed rather than freed, bytes."""
        return 0 if self.workload.recipe.engine.set_to_none else self.states.gradients_bytes

    @property
    def resident_gradients(self) -> int:
        """Gradients that are there when a micro-batch starts, bytes."""
        accumulates = self.strategy.gradient_accumulation_steps > 1
        return self.states.gradients_bytes if accumulates else self.lasting_gradients

    @property
    def tied_gradient(self) -> int:
        """Gradient of a matrix that is output and embedding, bytes; 0 where there is no such matrix, or it is frozen.

        Source: torch/csrc/autograd/input_buffer.cpp: what the output gives waits for what the embedding gives; it is a
        view (MmBackward transposes it), so their sum is a third tensor.
        """
        shape = self.workload.model
        tied = shape.tie_word_embeddings and shape.head and self.setting.trains_base
        return shape.head[-1].num_weights * self.setting.weight_bytes if tied else 0


def peak_bytes(workload: Workload, strategy: Strategy) -> int:
    """Return the peak allocated bytes of a strategy: the max over all moments, for search.

    Equals `estimate(workload, strategy).peak_allocated_bytes` (property test).
    """
    profile = profile_strategy(workload, strategy)
    tokens = strategy.micro_batch_size * _sequence_tokens(workload)
    return max(first + slope * tokens for first, slope in profile.totals)


def certain_bytes(workload: Workload, strategy: Strategy) -> int:
    """Return what no peak is below, bytes: weights, and gradients and optimizer states that are there at once."""
    profile = profile_strategy(workload, strategy)
    tokens = strategy.micro_batch_size * _sequence_tokens(workload)
    return profile.parameters_bytes + max((row.gradients + row.optimizer_states).at(tokens) for row in profile.rows)


_PROFILES: dict[tuple[int, Strategy | tuple], tuple[Workload, Profile]] = {}
_MOST_PROFILES = 512


def profile_strategy(workload: Workload, strategy: Strategy) -> Profile:
    """Return the affine rows of every moment; cached by workload identity and all knobs but the batch split."""
    key = (
        id(workload), strategy.gradient_accumulation_steps > 1,
        strategy.micro_batch_size if is_flattened(workload, strategy) else strategy.micro_batch_size > 1,
        strategy.activation_checkpointing, strategy.attention_kernel, strategy.loss_kernel, strategy.optimizer_kernel,
        strategy.layer_kernels, strategy.padding_free, strategy.activation_offload,
        strategy.mesh.data_parallel_size > 1,
    )  # fmt: skip
    found = _PROFILES.get(key)
    if found is not None and found[0] is workload:
        return found[1]
    if len(_PROFILES) >= _MOST_PROFILES:
        _PROFILES.clear()
    profile = _profile(_read_parts(workload, strategy))
    _PROFILES[key] = (workload, profile)
    return profile


def _read_parts(workload: Workload, strategy: Strategy) -> _Parts:
    setting, shape = read_setting(workload, strategy), workload.model
    reentrant = workload.recipe.engine.reentrant_checkpointing
    layers = tuple(
        (group, cost_layer(group, setting, strategy.activation_checkpointing, reentrant)) for group in shape.groups
    )
    head = cost_head(shape, setting, workload.recipe.engine, strategy.loss_kernel)
    return _Parts(workload, strategy, setting, count_states(shape, workload.recipe), layers, head)


def _profile(parts: _Parts) -> Profile:
    workload = parts.workload
    rows = tuple(_moments(parts))
    overhead = workspace_bytes(workload.cluster.device) + unpacking_bytes(workload.model, parts.setting)
    inputs = input_bytes(parts.setting)
    communication = _communication_bytes(parts)
    always = fixed(parts.states.parameters_bytes + overhead + communication) + inputs
    totals = {tuple(row.total + always) for row in rows}
    kept = [one for one in totals if not any(_dominates(other, one) for other in totals)]
    return Profile(
        parts.states.parameters_bytes, overhead, communication, parts.states.paged_bytes, inputs, rows, tuple(kept)
    )


def _communication_bytes(parts: _Parts) -> int:
    """Replicas reduce gradients through buckets that together are as large as the gradients.

    Source: torch/nn/parallel/distributed.py: `gradient_as_bucket_view` is False unless asked for.
    """
    return parts.states.gradients_bytes if parts.strategy.mesh.data_parallel_size > 1 else 0


def _dominates(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def _moments(parts: _Parts) -> Iterator[Rows]:
    """Yield the candidates of every moment, in order of the step."""
    yield from _forward_rows(parts)
    yield from _head_rows(parts)
    yield from _backward_rows(parts)
    yield _step_rows(parts)
    yield from _evaluation_rows(parts)
    yield Rows("saving", fixed(parts.lasting_gradients), fixed(parts.states.optimizer_bytes), ZERO, ZERO)


def _kept_by_layers(parts: _Parts) -> Size:
    return sum((_kept(parts, block).times(group.count) for group, block in parts.layers), _kept_before(parts))


def _kept_before(parts: _Parts) -> Size:
    """What embeddings keep: offloaded with the rest, if that is."""
    return ZERO if parts.strategy.activation_offload else kept_by_embeddings(parts.workload.model, parts.setting)


def _kept(parts: _Parts, block: Block) -> Size:
    return block.clinging if parts.strategy.activation_offload else block.kept


def _cached_below(parts: _Parts, index: int) -> Size:
    """Return what autocast caches of the layers before the last one of a group; of all layers before the head.

    Source: aten/src/ATen/autocast_mode.cpp cached_cast: 16-bit copies of trained fp32 weights, adapters among them,
    are dropped when the forward pass has ended.
    """
    before = sum((block.cached.times(group.count) for group, block in parts.layers[: index + 1]), ZERO)
    return before - parts.layers[index][1].cached if index < len(parts.layers) else before


def _cached_keys(parts: _Parts, index: int) -> Size:
    """Return the keys and values that a decoder's cache has of the layers of a group and of those before it.

    Source: models/t5 T5ForConditionalGeneration.__init__: the decoder's config is a copy, whose `use_cache` stays on.
    In training attention keeps the same tensors, and checkpointing turns the cache off.
    """
    if not parts.setting.code.keeps_cache:
        return ZERO
    widths = [
        group.count * sum(block.k_size + block.v_size for block in (group.attention, group.cross_attention) if block)
        for group, _ in parts.layers[: index + 1] if group.cross_attention is not None
    ]  # fmt: skip
    return per_token(parts.setting.compute_bytes * sum(widths))


def _cached_apart(parts: _Parts, index: int) -> Size:
    """Return the same in training; without checkpointing each layer keeps its own copies anyway."""
    return ZERO if parts.strategy.activation_checkpointing == "none" else _cached_below(parts, index)


def _busy(parts: _Parts, name: str, instant: Instant, below: Size, gradients: int, extra: Size = ZERO) -> Rows:
    """A row while the step runs: what layers below keep, this instant, gradients so far (`loss` comes first)."""
    resident, made = parts.resident_gradients, instant.weight_grads
    if resident:  # a new gradient is added to the one before and freed; one that waits for its other half stays
        made = fixed(parts.tied_gradient if name.startswith("backward") else min(made.fixed, parts.tied_gradient))
    return Rows(
        name, fixed(resident or gradients) + made, fixed(parts.states.optimizer_bytes),
        below + instant.kept, instant.passing + extra,
    )  # fmt: skip


def _forward_rows(parts: _Parts) -> Iterator[Rows]:
    below = _kept_before(parts)
    for index, (group, block) in enumerate(parts.layers):
        last = below + _kept(parts, block).times(group.count - 1)
        for instant in block.forward:
            yield _busy(parts, _group_name("forward", parts, index), instant, last, 0, _cached_apart(parts, index))
        below = below + _kept(parts, block).times(group.count)


def _head_rows(parts: _Parts) -> Iterator[Rows]:
    below, cache = _kept_by_layers(parts), _cached_apart(parts, len(parts.layers))
    held = held_logits(parts.workload, parts.strategy, parts.setting)
    for instant in parts.head.forward:
        yield _busy(parts, "loss", instant, below, 0, cache)
    for instant in parts.head.backward:
        yield _busy(parts, "loss backward", instant, below, 0, held)


def _backward_rows(parts: _Parts) -> Iterator[Rows]:
    """Backward of each group, at its last layer (most activations) and its first (most gradients)."""
    recipe, held = parts.workload.recipe, held_logits(parts.workload, parts.strategy, parts.setting)
    made = parts.head.weight_gradients.fixed if recipe.method == "full" else 0
    below = _kept_by_layers(parts)
    for index in range(len(parts.layers) - 1, -1, -1):
        group, block = parts.layers[index]
        name, per_layer = _group_name("backward", parts, index), layer_gradient_bytes(group, recipe)
        below, beside = below - _kept(parts, block), _input_beside(parts, block)
        if block.hangs_apart:
            below = below + block.clinging
        for instant in block.backward:
            yield _busy(parts, name, instant, below + beside, made, held)
        rest = group.count - 1
        below, made = below - (_kept(parts, block) - block.clinging).times(rest), made + per_layer * rest
        if rest:
            for instant in block.backward:
                yield _busy(parts, name, instant, below + beside, made, held)
        made += per_layer
        if not block.hangs_apart:
            below = below + block.clinging
    yield from _embedding_rows(parts, held)


def _embedding_rows(parts: _Parts, held: Size) -> Iterator[Rows]:
    """The end of the backward pass: a table's gradient is made whole, beside its older parts and their sum.

    Leaves out: the kernel's fp32 sums of rows (4.4 bytes x hidden a token), while no activations are left.
    """
    shape, tied = parts.workload.model, parts.tied_gradient
    if not shape.embeddings or not parts.setting.trains_base:
        return
    resident, table = parts.resident_gradients, shape.embeddings[0].num_parameters * parts.setting.weight_bytes
    fresh = 2 * tied + (table if resident else 0)
    gradients = fixed((resident or parts.states.gradients_bytes) + fresh)
    stream = parts.layers[0][1].stream if parts.layers else ZERO
    yield Rows(_group_name("backward", parts, 0), gradients, fixed(parts.states.optimizer_bytes), ZERO, stream + held)


def _input_beside(parts: _Parts, block: Block) -> Size:
    """Input of a layer that runs again, where none of its operations keeps it: the checkpoint holds it meanwhile."""
    made = [sum(event.allocates for event in events) for events in (block.forward_events, block.evaluation_events)]
    recomputes = parts.strategy.activation_checkpointing != "none"
    return block.stream if recomputes and made[0] == made[1] else ZERO


def _group_name(what: str, parts: _Parts, index: int) -> str:
    if len(parts.layers) == 1:
        return f"{what} of layers"
    return f"{what} of layer group {index + 1} of {len(parts.layers)}"


def _step_rows(parts: _Parts) -> Rows:
    states, workload = parts.states, parts.workload
    temporaries = step_temporaries_bytes(workload.model, workload.recipe, parts.strategy.optimizer_kernel)
    return Rows(
        "optimizer step", fixed(states.gradients_bytes), fixed(states.optimizer_bytes), ZERO, fixed(temporaries)
    )


def _evaluation_rows(parts: _Parts) -> Iterator[Rows]:
    """Evaluation with the training micro-batch: nothing kept, optimizer states resident, logits made all the same."""
    if not parts.workload.recipe.engine.evaluates:
        return
    for index, block in enumerate((*(block for _, block in parts.layers), parts.head)):
        for instant in block.evaluation:
            passing = instant.kept + instant.passing + _cached_below(parts, index) + _cached_keys(parts, index)
            gradients, states = fixed(parts.lasting_gradients), fixed(parts.states.optimizer_bytes)
            yield Rows("evaluation", gradients, states, ZERO, passing)


def _sequence_tokens(workload: Workload) -> int:
    return workload.model.sequence_tokens or workload.data.seq_len


def estimate(workload: Workload, strategy: Strategy) -> Estimate:
    """Return the formula's answer: every moment with its ledger, allocated, reserved and device bytes.

    Raises:
        UnsupportedModel: the recipe has a part the formula does not know.
    """
    from brim.cost.reserved import estimate_reserved
    from brim.cost.steptime import step_time

    profile = profile_strategy(workload, strategy)
    tokens = strategy.micro_batch_size * _sequence_tokens(workload)
    steady = tuple(_ledgers(profile, tokens))
    peak = max(steady, key=lambda moment: moment.total_bytes)
    moments = (_first_step(profile, tokens), *steady)
    reserved = max(peak.total_bytes, estimate_reserved(workload, strategy))
    context = context_bytes(workload.cluster.device)
    return Estimate(
        source="formula", moments=moments, peak_allocated_bytes=peak.total_bytes, peak_reserved_bytes=reserved,
        device_bytes=reserved + context + profile.paged_bytes, peak_moment=peak.name,
        step_time=step_time(workload, strategy), margin_bytes=margin_bytes("formula", peak.total_bytes),
        notes=_notes(workload, strategy),
    )  # fmt: skip


def _ledgers(profile: Profile, tokens: int) -> Iterable[Moment]:
    """Yield one moment per name: its highest candidate at this many tokens."""
    best: dict[str, Rows] = {}
    for row in profile.rows:
        if row.name not in best or row.total.at(tokens) > best[row.name].total.at(tokens):
            best[row.name] = row
    for row in best.values():
        yield _moment(profile, row, tokens)


def _moment(profile: Profile, row: Rows, tokens: int) -> Moment:
    ledger = Ledger(
        parameters=profile.parameters_bytes, gradients=row.gradients.at(tokens),
        optimizer_states=row.optimizer_states.at(tokens), activations=row.activations.at(tokens),
        temporaries=row.temporaries.at(tokens), communication=profile.communication_bytes,
        inputs=profile.inputs.at(tokens), overhead=profile.overhead_bytes,
    )  # fmt: skip
    return Moment(name=row.name, ledger=ledger)


def _first_step(profile: Profile, tokens: int) -> Moment:
    """The highest point before the first optimizer step has made its states: what a probe of one pass would see."""
    busy = [row for row in profile.rows if row.name.startswith(("forward", "loss", "backward"))]
    highest = max(busy, key=lambda row: (row.total - row.optimizer_states).at(tokens))
    return _moment(profile, highest._replace(name="first step", optimizer_states=ZERO), tokens)


def _notes(workload: Workload, strategy: Strategy) -> tuple[str, ...]:
    notes = [f"sized for micro-batches whose every sequence has {_sequence_tokens(workload):,} tokens"]
    if any(hasattr(group.mlp, "router") for group in workload.model.groups):
        notes.append("tokens are assumed to be spread evenly over experts")
    if is_masked(workload, strategy) and not workload.recipe.engine.always_masks:
        why = "several share a row" if is_flattened(workload, strategy) else "one of them is taken to be shorter"
        notes.append(f"sized with an attention mask, since {why}")
    if workload.recipe.engine.evaluates:
        notes.append("evaluation runs with the training micro-batch")
    return tuple(notes)

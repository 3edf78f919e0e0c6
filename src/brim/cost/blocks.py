"""What one layer, and the head, cost in memory: what they keep, and how high they reach forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from brim.cost.head import record_head
from brim.cost.layers import record_layer
from brim.cost.setting import Setting
from brim.cost.tape import (
    ZERO,
    Event,
    Instant,
    Size,
    Tape,
    Tensor,
    highest,
    list_clinging,
    run_backward,
    run_forward,
)
from brim.spec.model import LayerGroup, ModelShape
from brim.spec.recipe import Engine
from brim.spec.strategy import Checkpointing, LossKernel


class Block(NamedTuple):
    """Memory of one block, relative to what was there before it."""

    kept: Size
    """What stays from its forward pass to its backward pass."""
    stream: Size
    """Its input, which is also the size of its output and of their gradients."""
    forward: tuple[Instant, ...]
    """Highest instants of the forward pass; the input is counted."""
    backward: tuple[Instant, ...]
    """Highest instants of the backward pass, recomputation included; the input is counted."""
    evaluation: tuple[Instant, ...]
    """Highest instants of a forward pass that records nothing; the input is counted."""
    attention_kept: Size
    """What selective checkpointing keeps beside the input: attention outputs."""
    copies: tuple[Size, ...]
    """16-bit copies of trained fp32 weights, which autocast has until the forward pass ends."""
    weight_gradients: Size
    """Gradients of the block's own matrices, where they train."""
    forward_events: tuple[Event, ...]
    """Allocations and releases of the forward pass that records."""
    backward_events: tuple[Event, ...]
    """Allocations and releases of the backward pass after it."""
    evaluation_events: tuple[Event, ...]
    """Allocations and releases of the forward pass that records nothing."""
    hanging: tuple[Size, ...] = ()
    """What of `kept` hangs on the graph of the step, tensor by tensor: neither checkpointing nor the block's backward
    pass gives it up."""
    hangs_apart: bool = False
    """Whether `backward` comes on top of what hangs on the graph, as a recomputation does."""

    @property
    def cached(self) -> Size:
        """What autocast has of this block until the forward pass ends."""
        return sum(self.copies, ZERO)

    @property
    def clinging(self) -> Size:
        """What hangs on the graph of the step."""
        return sum(self.hanging, ZERO)


def _cost(record: Callable[[], tuple[Tape, Tensor]], *, checkpointed: bool, recomputes_apart: bool = False) -> Block:
    tape, stream = record()
    stream.held = checkpointed
    run = run_forward(tape, [stream], keeps=True)
    split, seen, kept = len(run.instants), len(run.events), run.kept
    run_backward(tape, run, clings=not recomputes_apart)
    bare_tape, bare_stream = record()
    bare_stream.held = checkpointed
    bare = run_forward(bare_tape, [bare_stream], keeps=False)
    hanging = [tensor for tensor in list_clinging(tape) if not (checkpointed and tensor is stream)]
    copies = [op.output.size for op in tape.ops if op.output.held and op.name.endswith("weight copy")]
    apart = hanging if recomputes_apart else []
    attention = [
        op.output.size for op in tape.ops
        if op.name in ("attention", "attention lse") and all(op.output is not tensor for tensor in apart)
    ]  # fmt: skip
    return Block(
        kept=kept, stream=stream.size, forward=highest(run.instants[:split]), backward=highest(run.instants[split:]),
        evaluation=highest(bare.instants), attention_kept=sum(attention, ZERO),
        copies=tuple(copies), weight_gradients=run.weight_grads,
        forward_events=tuple(run.events[:seen]), backward_events=tuple(run.events[seen:]),
        evaluation_events=tuple(bare.events), hanging=tuple(tensor.size for tensor in hanging),
    )  # fmt: skip


@lru_cache(maxsize=256)
def cost_layer(group: LayerGroup, setting: Setting, checkpointing: Checkpointing, reentrant: bool = False) -> Block:
    """Return the memory of one layer of a group. Under checkpointing, `backward` starts with the recomputation.

    Source: torch/utils/checkpoint.py: the reentrant form runs the layer to its end and holds the output while it
    goes back; the other stops at the last tensor backward needs.
    """
    checkpointed = checkpointing != "none"
    apart = checkpointed and not reentrant
    block = _cost(lambda: record_layer(group, setting), checkpointed=checkpointed, recomputes_apart=apart)
    if not checkpointed:
        return block
    # The gradient of the output waits while the layer is recomputed; the recomputed tensors are all kept at its end.
    waiting = [instant._replace(passing=instant.passing + block.stream) for instant in block.forward]
    output = block.stream if reentrant else ZERO
    back = [instant._replace(passing=instant.passing + output) for instant in block.backward]
    block = block._replace(forward=block.evaluation, backward=highest([*waiting, *back]))
    hanging = block.hanging if apart else ()  # a reentrant first pass has no graph
    if hanging:
        block = block._replace(forward=_first_pass(group, setting))
    kept = block.stream + sum(hanging, ZERO) + (block.attention_kept if checkpointing == "selective" else ZERO)
    return block._replace(kept=kept, hanging=hanging, hangs_apart=apart)


def _first_pass(group: LayerGroup, setting: Setting) -> tuple[Instant, ...]:
    """Highest instants of a checkpointed pass that has a graph: it keeps what hangs on that."""
    tape, stream = record_layer(group, setting)
    stream.held = True
    return highest(run_forward(tape, [stream], keeps=False, clings=True).instants)


@lru_cache(maxsize=256)
def cost_head(shape: ModelShape, setting: Setting, engine: Engine, loss: LossKernel) -> Block:
    """Return the memory from the last layer's output to the loss and back."""
    return _cost(lambda: record_head(shape, setting, engine, loss), checkpointed=False)

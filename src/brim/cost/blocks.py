"""What one layer, and the head, cost in memory: what they keep, and how high they reach forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from brim.cost.head import record_head
from brim.cost.layers import record_layer
from brim.cost.setting import Setting
from brim.cost.tape import Event, Instant, Size, Tape, Tensor, highest, run_backward, run_forward
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

    @property
    def cached(self) -> Size:
        """What autocast has of this block until the forward pass ends."""
        return sum(self.copies, Size(0, 0))


def _cost(record: Callable[[], tuple[Tape, Tensor]], *, checkpointed: bool) -> Block:
    tape, stream = record()
    stream.held = checkpointed
    run = run_forward(tape, [stream], keeps=True)
    split, seen, kept = len(run.instants), len(run.events), run.kept
    run_backward(tape, run)
    bare_tape, bare_stream = record()
    bare_stream.held = checkpointed
    bare = run_forward(bare_tape, [bare_stream], keeps=False)
    copies = [op.output.size for op in tape.ops if op.output.held and op.name.endswith("weight copy")]
    attention = [op.output.size for op in tape.ops if op.name in ("attention", "attention lse")]
    return Block(
        kept=kept, stream=stream.size, forward=highest(run.instants[:split]), backward=highest(run.instants[split:]),
        evaluation=highest(bare.instants), attention_kept=sum(attention, Size(0, 0)),
        copies=tuple(copies), weight_gradients=run.weight_grads,
        forward_events=tuple(run.events[:seen]), backward_events=tuple(run.events[seen:]),
        evaluation_events=tuple(bare.events),
    )  # fmt: skip


@lru_cache(maxsize=256)
def cost_layer(group: LayerGroup, setting: Setting, checkpointing: Checkpointing, reentrant: bool = False) -> Block:
    """Return the memory of one layer of a group. Under checkpointing, `backward` starts with the recomputation.

    Source: torch/utils/checkpoint.py: the reentrant form runs the layer to its end and holds the output while it
    goes back; the other stops at the last tensor backward needs.
    """
    block = _cost(lambda: record_layer(group, setting), checkpointed=checkpointing != "none")
    if checkpointing == "none":
        return block
    # The gradient of the output waits while the layer is recomputed; the recomputed tensors are all kept at its end.
    waiting = [instant._replace(passing=instant.passing + block.stream) for instant in block.forward]
    kept = block.stream + (block.attention_kept if checkpointing == "selective" else Size(0, 0))
    output = block.stream if reentrant else Size(0, 0)
    back = [instant._replace(passing=instant.passing + output) for instant in block.backward]
    return block._replace(kept=kept, forward=block.evaluation, backward=highest([*waiting, *back]))


@lru_cache(maxsize=256)
def cost_head(shape: ModelShape, setting: Setting, engine: Engine, loss: LossKernel) -> Block:
    """Return the memory from the last layer's output to the loss and back."""
    return _cost(lambda: record_head(shape, setting, engine, loss), checkpointed=False)

"""A block of the model as a tape of operations, and what memory does while it runs.

The formula counts as autograd does: an operation makes an output, keeps some tensors for the
backward pass, and drops the rest when Python lets go of them. Running the tape forward and
backward gives every allocation and release in order. Sizes are affine in the tokens of a
micro-batch (`Size`), so one run answers for every micro-batch size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Size(NamedTuple):
    """Bytes as `fixed + per_token x tokens of the micro-batch`."""

    fixed: int
    per_token: int

    def __add__(self, other: Size) -> Size:  # type: ignore[override]
        return Size(self.fixed + other.fixed, self.per_token + other.per_token)

    def __sub__(self, other: Size) -> Size:
        return Size(self.fixed - other.fixed, self.per_token - other.per_token)

    def times(self, factor: int) -> Size:
        """Return this size `factor` times over."""
        return Size(self.fixed * factor, self.per_token * factor)

    def at(self, tokens: int) -> int:
        """Return the bytes for that many tokens."""
        return self.fixed + self.per_token * tokens


ZERO = Size(0, 0)


def per_token(size_bytes: int) -> Size:
    """Return a size that grows by `size_bytes` with each token."""
    return Size(0, size_bytes)


def fixed(size_bytes: int) -> Size:
    """Return a size that does not depend on the micro-batch."""
    return Size(size_bytes, 0)


@dataclass(eq=False, slots=True)
class Tensor:
    """One storage. `needs_grad`: a gradient flows to it. `held`: Python keeps it until the block returns."""

    name: str
    size: Size
    needs_grad: bool = True
    held: bool = False


@dataclass(eq=False, slots=True)
class Op:
    """One operation.

    `passes_grad`: inputs receive the output's gradient itself, not a new tensor. `grad_in_place`: the gradient is
    written over what the operation kept. `holds`: tensors that a variable keeps until this operation is done. `clings`:
    tensors that hang on the graph's node itself, which checkpointing does not see and backward does not release.
    """

    name: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    saves: tuple[Tensor, ...] = ()
    scratch: Size = ZERO
    grad_scratch: Size = ZERO
    weight_grad: Size = ZERO
    passes_grad: bool = False
    grad_in_place: bool = False
    holds: tuple[Tensor, ...] = ()
    clings: tuple[Tensor, ...] = ()


class Instant(NamedTuple):
    """What is live at one point: kept for backward, of passing use, and gradients of weights made so far."""

    op: str
    kept: Size
    passing: Size
    weight_grads: Size

    @property
    def total(self) -> Size:
        """All of it."""
        return self.kept + self.passing + self.weight_grads


class Event(NamedTuple):
    """An allocation (`True`) or release of one storage, in order of the run."""

    allocates: bool
    key: int
    size: Size


@dataclass(slots=True)
class Tape:
    """Operations of a block in call order, recorded by the layer builders."""

    ops: list[Op] = field(default_factory=list)

    def op(
        self,
        name: str,
        inputs: Iterable[Tensor],
        size: Size,
        *,
        saves: Iterable[Tensor] = (),
        saves_output: bool = False,
        clings: Iterable[Tensor] = (),
        scratch: Size = ZERO,
        grad_scratch: Size = ZERO,
        weight_grad: Size = ZERO,
        passes_grad: bool = False,
        grad_in_place: bool = False,
        needs_grad: bool | None = None,
        held: bool = False,
    ) -> Tensor:
        """Record one operation and return its output."""
        inputs = tuple(inputs)
        grad = needs_grad if needs_grad is not None else any(tensor.needs_grad for tensor in inputs)
        output = Tensor(name, size, needs_grad=grad, held=held)
        kept = tuple(saves) + ((output,) if saves_output else ())
        self.ops.append(
            Op(name, inputs, output, kept, scratch, grad_scratch, weight_grad, passes_grad, grad_in_place,
               clings=tuple(clings))
        )  # fmt: skip
        return output

    def keep(self, *tensors: Tensor) -> None:
        """Let the last recorded operation save tensors too."""
        self.ops[-1].saves += tensors

    def hold(self, *tensors: Tensor) -> None:
        """Keep tensors until the last recorded operation is done: a local variable, or a caller's, has them."""
        self.ops[-1].holds += tensors


class _Run:
    """Live storages while a tape runs; every change is recorded."""

    __slots__ = ("events", "instants", "kept", "live", "passing", "weight_grads")

    def __init__(self) -> None:
        self.live: dict[int, tuple[Size, bool]] = {}
        self.kept = self.passing = self.weight_grads = ZERO
        self.instants: list[Instant] = []
        self.events: list[Event] = []

    def note(self, op: str, extra: Size = ZERO) -> None:
        self.instants.append(Instant(op, self.kept, self.passing + extra, self.weight_grads))

    def allocate(self, key: int, size: Size, *, kept: bool) -> None:
        self.live[key] = (size, kept)
        self.kept, self.passing = (self.kept + size, self.passing) if kept else (self.kept, self.passing + size)
        self.events.append(Event(True, key, size))

    def free(self, key: int) -> None:
        size, kept = self.live.pop(key)
        self.kept, self.passing = (self.kept - size, self.passing) if kept else (self.kept, self.passing - size)
        self.events.append(Event(False, key, size))

    def scratch(self, op: str, size: Size) -> None:
        if size != ZERO:
            key = -len(self.events) - 1
            self.allocate(key, size, kept=False)
            self.note(op)
            self.free(key)


def _last_uses(tape: Tape, result: Tensor) -> dict[int, list[Tensor]]:
    """Tensors whose last use is op i, by i: Python lets go of them there unless they are held."""
    last: dict[int, tuple[int, Tensor]] = {}
    for index, op in enumerate(tape.ops):
        for tensor in (*op.inputs, op.output, *op.holds):
            last[id(tensor)] = (index, tensor)
    by_op: dict[int, list[Tensor]] = {}
    for index, tensor in last.values():
        if tensor is not result:
            by_op.setdefault(len(tape.ops) - 1 if tensor.held else index, []).append(tensor)
    return by_op


def _saved_ids(tape: Tape) -> set[int]:
    return {id(tensor) for op in tape.ops if op.output.needs_grad for tensor in op.saves}


def list_clinging(tape: Tape) -> list[Tensor]:
    """Return what hangs on nodes of the graph, each tensor once."""
    return list({id(tensor): tensor for op in tape.ops if op.output.needs_grad for tensor in op.clings}.values())


def run_forward(tape: Tape, given: Iterable[Tensor], *, keeps: bool, clings: bool | None = None) -> _Run:
    """Run the tape forward. `given` tensors exist before and are not counted unless an op saves them.

    Args:
        tape: the block; its last op makes the result, which outlives the run.
        given: inputs owned by the caller; they are counted from the start only if saved.
        keeps: whether autograd records (False inside a checkpointed block's first pass).
        clings: whether there is a graph that tensors can hang on; None for `keeps`.
    """
    run, result = _Run(), tape.ops[-1].output
    saved = _saved_ids(tape) if keeps else set()
    if keeps if clings is None else clings:
        saved |= {id(tensor) for tensor in list_clinging(tape)}
    outside = {id(tensor) for tensor in given}
    for tensor in given:
        if id(tensor) in saved:
            run.allocate(id(tensor), tensor.size, kept=True)
    drops = _last_uses(tape, result)
    for index, op in enumerate(tape.ops):
        if id(op.output) not in outside:
            run.allocate(id(op.output), op.output.size, kept=id(op.output) in saved)
        run.note(op.name)
        run.scratch(op.name, op.scratch)
        for tensor in drops.get(index, ()):
            if id(tensor) in run.live and id(tensor) not in saved:
                run.free(id(tensor))
    return run


class _Gradients:
    """Gradient buffers of one backward pass: shared when an op passes its gradient through."""

    __slots__ = ("buffer_of", "run", "serial", "users")

    def __init__(self, run: _Run) -> None:
        self.run, self.serial = run, 0
        self.buffer_of: dict[int, int] = {}
        self.users: dict[int, int] = {}

    def share(self, tensor: Tensor, buffer: int) -> None:
        self.buffer_of[id(tensor)] = buffer
        self.users[buffer] = self.users.get(buffer, 0) + 1

    def make(self, op: str, tensor: Tensor) -> None:
        """Allocate a gradient; if the tensor already has one, add into it and release the new one."""
        self.serial += 1
        key = -(1 << 40) - self.serial
        self.run.allocate(key, tensor.size, kept=False)
        self.run.note(op)
        if id(tensor) in self.buffer_of:
            self.run.free(key)
        else:
            self.share(tensor, key)

    def drop(self, tensor: Tensor) -> None:
        buffer = self.buffer_of.pop(id(tensor), None)
        if buffer is None:
            return
        self.users[buffer] -= 1
        if not self.users[buffer]:
            self.run.free(buffer)


def run_backward(tape: Tape, run: _Run, *, clings: bool = True) -> None:
    """Continue a recording forward run with the backward pass; `run` then holds both.

    Args:
        tape: the block.
        run: its forward pass.
        clings: whether the graph of the forward pass lives on, and what hangs on it; that of a recomputation does not.
    """
    gradients, result = _Gradients(run), tape.ops[-1].output
    uses = _count_uses(tape, clings)
    for tensor in list_clinging(tape):
        if id(tensor) in run.live and id(tensor) not in uses:
            run.free(id(tensor))
    if id(result) in run.live and id(result) not in uses:
        run.free(id(result))  # the caller has moved on; only its gradient comes back
    gradients.make("backward", result)
    for op in reversed(tape.ops):
        if op.output.needs_grad:
            _backward_op(op, run, gradients, uses)


def _count_uses(tape: Tape, clings: bool) -> dict[int, int]:
    """Return how many releases each kept tensor waits for, by id; one that clings waits for one that never comes."""
    uses: dict[int, int] = {}
    for op in tape.ops:
        for tensor in (*op.saves, *(op.clings if clings else ())) if op.output.needs_grad else ():
            uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    return uses


def _backward_op(op: Op, run: _Run, gradients: _Gradients, uses: dict[int, int]) -> None:
    run.scratch(op.name, op.grad_scratch)
    run.weight_grads = run.weight_grads + op.weight_grad
    if op.grad_in_place:
        _release(op, run, uses)
    for tensor in op.inputs:
        if not tensor.needs_grad:
            continue
        if op.passes_grad and id(tensor) not in gradients.buffer_of and id(op.output) in gradients.buffer_of:
            gradients.share(tensor, gradients.buffer_of[id(op.output)])
        elif not op.passes_grad:
            gradients.make(op.name, tensor)
    run.note(op.name)
    gradients.drop(op.output)
    if not op.grad_in_place:
        _release(op, run, uses)


def _release(op: Op, run: _Run, uses: dict[int, int]) -> None:
    for tensor in op.saves:
        uses[id(tensor)] -= 1
        if not uses[id(tensor)] and id(tensor) in run.live:
            run.free(id(tensor))


def highest(instants: Iterable[Instant]) -> tuple[Instant, ...]:
    """Return the instants that are the highest for some number of tokens: no other is as high in both terms."""
    best: list[Instant] = []
    for instant in sorted(instants, key=lambda item: (item.total.per_token, item.total.fixed), reverse=True):
        if not best or instant.total.fixed > best[-1].total.fixed:
            best.append(instant)
    return tuple(best)

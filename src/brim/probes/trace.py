"""The trace: the real model's real step on tensors without data, every storage followed, the allocator replayed.

No weights are read and no GPU is needed. What a card does differently from a CPU stands in `kernels`; what stands in
for code that asks for data is said in the notes of the estimate.

Leaves out: cuDNN attention, collectives, what user callbacks allocate.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from brim.cost.ledger import Estimate
from brim.errors import MissingExtra, ProbeFailed
from brim.probes.pieces import Piece
from brim.probes.stream import Traced, read_estimate
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

if TYPE_CHECKING:
    from brim.probes.fold import Pattern
    from brim.probes.inputs import MakeInputs
    from brim.probes.model import BuildModel
    from brim.probes.tracker import Storage, StorageTracker


def trace(
    workload: Workload, strategy: Strategy, build_model: BuildModel, make_inputs: MakeInputs | None = None, *,
    fold: bool = True, lengths: Sequence[int] = (),
) -> Estimate:  # fmt: skip
    """Return what a strategy costs, from the storages of the model's own step.

    Args:
        workload: what is trained on what, with which recipe.
        strategy: how it is run.
        build_model: returns the model with random or no weights; called with the meta device as default.
        make_inputs: returns one micro-batch as keyword arguments of the model; by the model's signature if None.
        fold: whether alike layers are run four deep and their stream repeated.
        lengths: tokens of a sequence, micro-batch by micro-batch, in as many optimizer steps as they fill: blocks of
            one length are of no use to another, and the pool grows. Empty for `seq_len` in every micro-batch.

    Returns:
        Moments of two optimizer steps with their ledgers; allocated, reserved and device bytes of one device.

    Raises:
        MissingExtra: torch is not installed. ProbeFailed: the step does not run, or is of a kind not traced yet.
    """
    with quiet():
        traced = trace_step(workload, strategy, build_model, make_inputs, fold=fold, lengths=lengths)
        return read_estimate(workload, strategy, traced)


def trace_step(
    workload: Workload, strategy: Strategy, build_model: BuildModel, make_inputs: MakeInputs | None = None, *,
    fold: bool = True, lengths: Sequence[int] = (),
) -> Traced:  # fmt: skip
    """Return the stream of the whole model's steps; arguments and errors as those of `trace`."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(package=error.name or "torch", extra="trace", purpose="--by trace") from None
    refuse_untraced(workload, strategy)
    with quiet():
        return _trace_quietly(workload, strategy, build_model, make_inputs, fold, tuple(lengths))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from warning about a model that is never used, and the garbage collector from what was there.

    The libraries are hundreds of thousands of objects; going over them again and again takes as long as the trace.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # fake tensors log what then becomes a ProbeFailed
    froze = gc.get_freeze_count() == 0
    if froze:
        gc.freeze()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if froze:
            gc.unfreeze()


def _trace_quietly(
    workload: Workload, strategy: Strategy, build_model: BuildModel, make_inputs: MakeInputs | None, fold: bool,
    lengths: tuple[int, ...],
) -> Traced:  # fmt: skip
    from brim.probes.checkpointing import spans_layers
    from brim.probes.follow import follow_step

    # Not where layers are tied: by prefixes in one parameter, or by offload that keeps the last five tensors.
    folds = workload.recipe.method != "prefix-tuning" and not spans_layers(strategy, workload.recipe.engine)
    if fold and folds:
        found = _trace_folded(workload, strategy, build_model, make_inputs, lengths)
        if found is not None:
            return found
    tracker, _ = follow_step(workload, strategy, build_model, make_inputs, lengths=lengths)
    return _whole(tracker)


def _trace_folded(
    workload: Workload, strategy: Strategy, build_model: BuildModel, make_inputs: MakeInputs | None,
    lengths: tuple[int, ...],
) -> Traced | None:  # fmt: skip
    """Return the stream of the whole model from that of four repeats; None where the whole must be run.

    A model that counts its own layers (T5's decoder keeps a cache of as many) may not run when some are missing.
    """
    from brim.probes.fold import unfold
    from brim.probes.follow import follow_step, list_notes

    try:
        tracker, pattern = follow_step(workload, strategy, build_model, make_inputs, fold=True, lengths=lengths)
    except ProbeFailed:
        return None
    if pattern is None:
        return _whole(tracker)
    stream = unfold(tracker.events, tracker.storages, pattern)
    if stream is None:
        return None
    folded = f"{pattern.kept} of {pattern.num_layers} layers were run, alike ones repeated"
    return Traced(*stream, (*list_notes(tracker), folded), paged_bytes(tracker.storages, pattern))


def _whole(tracker: StorageTracker) -> Traced:
    """Return the stream of a model whose layers all ran."""
    from brim.probes.follow import list_notes

    return Traced([Piece(tracker.events)], tracker.storages, list_notes(tracker), paged_bytes(tracker.storages))


def paged_bytes(storages: Mapping[int, Storage], pattern: Pattern | None = None) -> int:
    """Return the bytes of paged optimizer states, those of layers that were left out among them."""
    paged = [one for one in storages.values() if one.category == "paged"]
    inner = sum(one.num_bytes for one in paged if pattern and pattern.unit_of(one.layer) == pattern.middle)
    return sum(one.num_bytes for one in paged) + inner * (pattern.missing if pattern else 0)


def refuse_untraced(workload: Workload, strategy: Strategy) -> None:
    """Raise ProbeFailed for what the trace does not run yet; nothing is ever left out in silence."""
    untraced = {
        "torch.compile": strategy.compile,
        f"offload of {strategy.offload}": strategy.offload != "none",
        "more than one device": strategy.mesh.num_devices > 1 or strategy.zero_stage > 0,
    }
    for what, found in untraced.items():
        if found:
            raise ProbeFailed(f"{what}: not traced yet; use --by formula", what=what)

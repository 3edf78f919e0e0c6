"""The trace: the real model's real step on tensors without data, every storage followed, the allocator replayed.

No weights are read and no GPU is needed. What a card does differently from a CPU stands in `kernels`; what stands in
for code that asks for data is said in the notes of the estimate.

Leaves out: cuDNN attention, collectives, what user callbacks allocate.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from brim.cost.ledger import Estimate
from brim.cost.overhead import workspace_bytes
from brim.errors import BrimError, MissingExtra, ProbeFailed, quoted
from brim.probes.stream import MODEL_PHASE, Traced, read_estimate
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

if TYPE_CHECKING:
    from brim.probes.fold import Pattern
    from brim.probes.inputs import MakeInputs
    from brim.probes.model import BuildModel
    from brim.probes.tracker import Storage, StorageTracker


def trace(
    workload: Workload, strategy: Strategy, build_model: BuildModel, make_inputs: MakeInputs | None = None, *,
    fold: bool = True,
) -> Estimate:  # fmt: skip
    """Return what a strategy costs, from the storages of the model's own step.

    Args:
        workload: what is trained on what, with which recipe.
        strategy: how it is run.
        build_model: returns the model with random or no weights; called with the meta device as default.
        make_inputs: returns one micro-batch as keyword arguments of the model; by the model's signature if None.
        fold: whether alike layers are run four deep and their stream repeated.

    Returns:
        Moments of two optimizer steps with their ledgers; allocated, reserved and device bytes of one device.

    Raises:
        MissingExtra: torch is not installed. ProbeFailed: the step does not run, or is of a kind not traced yet.
    """
    return read_estimate(workload, strategy, trace_step(workload, strategy, build_model, make_inputs, fold=fold))


def trace_step(
    workload: Workload, strategy: Strategy, build_model: BuildModel, make_inputs: MakeInputs | None = None, *,
    fold: bool = True,
) -> Traced:  # fmt: skip
    """Return the stream of the whole model's steps; arguments and errors as those of `trace`."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(package=error.name or "torch", extra="trace", purpose="--by trace") from None
    refuse_untraced(workload, strategy)
    with _quiet():
        return _trace_quietly(workload, strategy, build_model, make_inputs, fold)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries from warning about a model that is never used."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _trace_quietly(
    workload: Workload, strategy: Strategy, build_model: BuildModel, make_inputs: MakeInputs | None, fold: bool
) -> Traced:
    from brim.probes.checkpointing import spans_layers
    from brim.probes.fold import unfold

    # Not where layers are tied: by prefixes in one parameter, or by offload that keeps the last five tensors.
    folds = workload.recipe.method != "prefix-tuning" and not spans_layers(strategy, workload.recipe.engine)
    if fold and folds:
        tracker, pattern = follow_step(workload, strategy, build_model, make_inputs, fold=True)
        stream = unfold(tracker.events, tracker.storages, pattern) if pattern else (tracker.events, tracker.storages)
        if stream is not None:
            folded = [f"{pattern.kept} of {pattern.num_layers} layers were run, alike ones repeated"] if pattern else []
            return Traced(*stream, (*list_notes(tracker), *folded), paged_bytes(tracker.storages, pattern))
    tracker, _ = follow_step(workload, strategy, build_model, make_inputs)
    return Traced(tracker.events, tracker.storages, list_notes(tracker), paged_bytes(tracker.storages))


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


def follow_step(
    workload: Workload, strategy: Strategy, build_model: BuildModel, make_inputs: MakeInputs | None = None, *,
    fold: bool = False,
) -> tuple[StorageTracker, Pattern | None]:  # fmt: skip
    """Return the tracker after two optimizer steps on fake tensors, and how layers left out repeat; None if all ran.

    Raises:
        ProbeFailed: the step does not run.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )

    from brim.probes.custom_kernels import kernel_packages
    from brim.probes.experts import balance_experts
    from brim.probes.fold import fold_layers
    from brim.probes.grouped_heads import repeat_heads
    from brim.probes.inputs import plan_inputs
    from brim.probes.kernels import card_kernels, list_workspaces
    from brim.probes.model import find_layers, give_tensors, prepare_model
    from brim.probes.preferences import card_head, follow_reference, prepare_reference
    from brim.probes.step import note_step, plan_step, run_steps
    from brim.probes.tracker import StorageTracker
    from brim.probes.values import KnownValues

    patterns: list[Pattern | None] = [None]
    shorten = (lambda built: patterns.append(fold_layers(built))) if fold else None
    model = prepare_model(build_model, workload.recipe, strategy, shorten=shorten)
    reference = prepare_reference(build_model, workload.recipe, strategy, shorten=shorten)
    tracker = StorageTracker(list_workspaces, scalar=1.0, kind=FakeTensor)
    known = KnownValues(balance_experts(model, workload.moe_imbalance))
    tracker.read_scalar = known.read_scalar
    device = workload.cluster.device
    try:
        with FakeTensorMode(), known, card_kernels(device, strategy.attention_kernel), kernel_packages(model) as said:
            tracker.notes += said
            give_tensors(model)
            tracker.begin(MODEL_PHASE)
            tracker.follow(model.named_parameters(), "parameter")
            tracker.follow(model.named_buffers(), "buffer")
            for index, layer in enumerate(find_layers(model) or ()):
                tracker.tag((*layer.parameters(), *layer.buffers()), index)
            follow_reference(reference, tracker)
            for _ in range(2):  # one handle of the matrix library for the forward thread, one for autograd's
                tracker.reserve(workspace_bytes(device) // 2, "matrix library workspace")
            make = make_inputs or plan_inputs(workload, strategy, model)
            step = plan_step(workload, strategy, model, make, tracker, reference)
            tracker.notes += note_step(workload, strategy)
            with card_head(workload.recipe), repeat_heads(workload.recipe.engine), tracker:
                run_steps(step)
            tracker.notes += known.describe()
    except BrimError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        text = f"the model asks for the values of a tensor: {_where(error)}; pass a build_model that does not"
        raise ProbeFailed(text) from error
    except Exception as error:  # whatever the model's own code raises
        raise ProbeFailed(f"the step of {quoted(workload.model.name)} does not run: {_where(error)}") from error
    return tracker, patterns[-1]


def _where(error: Exception) -> str:
    """Return what went wrong in one line, with the model's own file and line."""
    line = (str(error).strip().splitlines() or [""])[0]
    text, place = f"{type(error).__name__}: {quoted(line)[1:-1]}", error.__traceback__
    origin = ""
    while place is not None:
        name = place.tb_frame.f_code.co_filename
        if "/torch/" not in name and "/brim/" not in name:
            origin = f" ({name.rpartition('site-packages/')[2]}:{place.tb_lineno})"
        place = place.tb_next
    return text + origin


def list_notes(tracker: StorageTracker) -> tuple[str, ...]:
    """Return what the traced code assumed, one sentence each."""
    import torch

    notes = [f"the model's own code on tensors without data, torch {torch.__version__.partition('+')[0]}"]
    if tracker.scalars_asked:
        places = len(tracker.scalars_asked)
        notes.append(f"the number 1 stands in where code reads one from the device ({places} places)")
    return (*notes, *tracker.notes)

"""The step on fake tensors: the model is given tensors without data, its loop is run, every storage is followed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from brim.cost.overhead import workspace_bytes
from brim.errors import BrimError, ProbeFailed, quoted
from brim.probes.boxes import match_in_order
from brim.probes.custom_kernels import kernel_packages
from brim.probes.experts import balance_experts
from brim.probes.fold import Pattern, fold_layers
from brim.probes.grouped_heads import repeat_heads
from brim.probes.inputs import MakeInputs, plan_inputs, plan_lengths
from brim.probes.kernels import card_kernels, list_workspaces
from brim.probes.model import BuildModel, find_layers, give_tensors, prepare_model
from brim.probes.phases import MODEL_PHASE
from brim.probes.preferences import card_head, follow_reference, prepare_reference
from brim.probes.step import note_step, plan_step, run_steps
from brim.probes.tracker import StorageTracker
from brim.probes.values import KnownValues
from brim.spec.device import Device
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload


def follow_step(
    workload: Workload, strategy: Strategy, build_model: BuildModel, make_inputs: MakeInputs | None = None, *,
    fold: bool = False, lengths: Sequence[int] = (),
) -> tuple[StorageTracker, Pattern | None]:  # fmt: skip
    """Return the tracker after the optimizer steps on fake tensors, and how layers left out repeat; None if all ran.

    Raises:
        ProbeFailed: the step does not run.
    """
    patterns: list[Pattern | None] = [None]
    shorten = (lambda built: patterns.append(fold_layers(built))) if fold else None
    model = prepare_model(build_model, workload.recipe, strategy, shorten=shorten)
    reference = prepare_reference(build_model, workload.recipe, strategy, shorten=shorten)
    tracker = StorageTracker(list_workspaces, scalar=1.0, kind=FakeTensor)
    known = KnownValues(balance_experts(model, workload.moe_imbalance))
    tracker.read_scalar = known.read_scalar
    kernels = card_kernels(workload.cluster.device, strategy.attention_kernel)
    with _explained(workload), FakeTensorMode(), known, kernels, kernel_packages(model) as said, \
            match_in_order(model) as matched:  # fmt: skip
        _take_memory(tracker, model, reference, workload.cluster.device)
        make = make_inputs or _plan_inputs(workload, strategy, model, lengths)
        step = plan_step(workload, strategy, model, make, tracker, reference)
        step.repeats = fold and make_inputs is None and not lengths
        if lengths:
            step.most_micro_batches = strategy.gradient_accumulation_steps
            step.num_steps = max(step.num_steps, -(-len(lengths) // step.num_micro_batches))
        with card_head(workload.recipe), repeat_heads(workload.recipe.engine), tracker:
            run_steps(step)
    tracker.notes += [*said, *matched, *note_step(workload, strategy), *known.describe()]
    return tracker, patterns[-1]


def _plan_inputs(
    workload: Workload, strategy: Strategy, model: torch.nn.Module, lengths: Sequence[int]
) -> MakeInputs:
    if lengths:
        return plan_lengths(workload, strategy, model, lengths)
    return plan_inputs(workload, strategy, model)


def _take_memory(
    tracker: StorageTracker, model: torch.nn.Module, reference: torch.nn.Module | None, device: Device
) -> None:
    """Follow what is there before the first micro-batch: weights, buffers, the matrix library's workspaces."""
    give_tensors(model)
    tracker.begin(MODEL_PHASE)
    tracker.follow(model.named_parameters(), "parameter")
    tracker.follow(model.named_buffers(), "buffer")
    for index, layer in enumerate(find_layers(model) or ()):
        tracker.tag((*layer.parameters(), *layer.buffers()), index)
    follow_reference(reference, tracker)
    for _ in range(2):  # one handle of the matrix library for the forward thread, one for autograd's
        tracker.reserve(workspace_bytes(device) // 2, "matrix library workspace")


@contextlib.contextmanager
def _explained(workload: Workload) -> Iterator[None]:
    """Say what failed inside in one line, with the model's own file and line."""
    try:
        yield
    except BrimError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        text = f"the model asks for the values of a tensor: {describe_failure(error)}; pass a build_model that does not"
        raise ProbeFailed(text) from error
    except Exception as error:  # whatever the model's own code raises
        text = f"the step of {quoted(workload.model.name)} does not run: {describe_failure(error)}"
        raise ProbeFailed(text) from error


def describe_failure(error: Exception) -> str:
    """Return what went wrong in one line, with the model's or the user's own file and line."""
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
    notes = [f"the model's own code on tensors without data, torch {torch.__version__.partition('+')[0]}"]
    if tracker.scalars_asked:
        places = len(tracker.scalars_asked)
        notes.append(f"the number 1 stands in where code reads one from the device ({places} places)")
    return (*notes, *tracker.notes)

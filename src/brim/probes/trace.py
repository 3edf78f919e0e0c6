"""The trace: the real model's real step on tensors without data, every storage followed, the allocator replayed.

No weights are read and no GPU is needed. What a card does differently from a CPU stands in `kernels`; what stands in
for code that asks for data is said in the notes of the estimate.

Leaves out: cuDNN attention, collectives, what user callbacks allocate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from brim.cost.allocator import CachingAllocator
from brim.cost.calibration import margin_bytes
from brim.cost.ledger import Estimate, Ledger, Moment
from brim.cost.overhead import context_bytes, workspace_bytes
from brim.errors import BrimError, MissingExtra, ProbeFailed, quoted
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

if TYPE_CHECKING:

    from brim.probes.inputs import MakeInputs
    from brim.probes.model import BuildModel
    from brim.probes.tracker import Event, Storage, StorageTracker

_ROWS = {
    "parameter": "parameters", "buffer": "buffers", "gradient": "gradients", "optimizer_state": "optimizer_states",
    "activation": "activations", "temporary": "temporaries", "input": "inputs", "workspace": "overhead",
}  # fmt: skip


def trace(
    workload: Workload, strategy: Strategy, build_model: BuildModel, make_inputs: MakeInputs | None = None, *,
    fold: bool = True,
) -> Estimate:  # fmt: skip
    """Return what a strategy costs, from the storages of the model's own step.

    Args:
        workload: what is trained on what, with which recipe.
        strategy: how it is run.
        build_model: returns the model with random or no weights; called with the meta device as default.
        make_inputs: returns one micro-batch as keyword arguments of the model; token ids and labels if None.
        fold: whether identical layers are run five deep and their stream repeated.

    Returns:
        Moments of two optimizer steps with their ledgers; allocated, reserved and device bytes of one device.

    Raises:
        MissingExtra: torch is not installed. ProbeFailed: the step does not run, or is of a kind not traced yet.
    """
    try:
        from brim.probes.fold import unfold
    except ImportError:
        raise MissingExtra(package="torch", extra="trace", purpose="--by trace") from None
    refuse_untraced(workload, strategy)
    tracker, stream, depth = None, None, 0
    if fold and len(workload.model.groups) == 1:
        tracker, depth = follow_step(workload, strategy, build_model, make_inputs, fold=True)
        stream = unfold(tracker.events, tracker.storages, depth) if depth else (tracker.events, tracker.storages)
    if tracker is None or stream is None:
        tracker, depth = follow_step(workload, strategy, build_model, make_inputs)
        stream = tracker.events, tracker.storages
    found = read_estimate(workload, strategy, *stream, len(tracker.scalars_asked))
    if depth:
        found = replace(found, notes=(*found.notes, f"5 of {depth} identical layers were run, the third for the rest"))
    return found


def refuse_untraced(workload: Workload, strategy: Strategy) -> None:
    """Raise ProbeFailed for what the trace does not run yet; nothing is ever left out in silence."""
    recipe, engine = workload.recipe, workload.recipe.engine
    untraced = {
        f"method {recipe.method}": recipe.quantization is not None,
        "DoRA": recipe.lora is not None and recipe.lora.use_dora,
        f"optimizer {recipe.optimizer}": recipe.optimizer not in ("adamw", "adam", "adamw_torch", "adamw_torch_fused"),
        "an fp32 master copy of the weights": recipe.master_weights,
        f"gradients in {recipe.gradient_dtype}": recipe.gradient_dtype is not None,
        f"loss kernel {strategy.loss_kernel}": strategy.loss_kernel != "dense",
        "checkpointing selective": strategy.activation_checkpointing == "selective",
        f"layer kernels {strategy.layer_kernels}": strategy.layer_kernels != "none",
        "activation offload": strategy.activation_offload,
        "torch.compile": strategy.compile,
        f"offload of {strategy.offload}": strategy.offload != "none",
        "more than one device": strategy.mesh.num_devices > 1 or strategy.zero_stage > 0,
        "padding-free micro-batches": strategy.padding_free,
        "packed sequences laid out as one": engine.flattens_packed and workload.data.packing,
        "a loop that drops or copies logits": engine.frees_narrow_logits or engine.copies_shifted_logits,
        "separate experts": not engine.fused_experts and any(hasattr(g.mlp, "router") for g in workload.model.groups),
    }
    for what, found in untraced.items():
        if found:
            raise ProbeFailed(f"{what}: not traced yet; use --by formula", what=what)


def follow_step(
    workload: Workload, strategy: Strategy, build_model: BuildModel, make_inputs: MakeInputs | None = None, *,
    fold: bool = False,
) -> tuple[StorageTracker, int]:  # fmt: skip
    """Return the tracker after two optimizer steps on fake tensors, and of how many layers five were run, 0 for all.

    Raises:
        ProbeFailed: the step does not run.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )

    from brim.probes.fold import fold_layers
    from brim.probes.inputs import plan_inputs
    from brim.probes.kernels import card_kernels, list_workspaces
    from brim.probes.model import find_layers, give_tensors, prepare_model
    from brim.probes.step import plan_step, run_steps
    from brim.probes.tracker import StorageTracker

    model = prepare_model(build_model, workload.recipe, strategy)
    depth = fold_layers(model) if fold else 0
    tracker = StorageTracker(list_workspaces, scalar=1.0, kind=FakeTensor)
    device = workload.cluster.device
    try:
        with FakeTensorMode(), card_kernels(device, strategy.attention_kernel):
            give_tensors(model)
            tracker.begin("model")
            tracker.follow(model.parameters(), "parameter")
            tracker.follow(model.buffers(), "buffer")
            for index, layer in enumerate(find_layers(model) or ()):
                tracker.tag((*layer.parameters(), *layer.buffers()), index)
            for _ in range(2):  # one handle of the matrix library for the forward thread, one for autograd's
                tracker.reserve(workspace_bytes(device) // 2, "matrix library workspace")
            step = plan_step(workload, strategy, model, make_inputs or plan_inputs(workload, strategy, model), tracker)
            with tracker:
                run_steps(step)
    except BrimError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        text = f"the model asks for the values of a tensor: {_where(error)}; pass a build_model that does not"
        raise ProbeFailed(text) from error
    except Exception as error:  # whatever the model's own code raises
        raise ProbeFailed(f"the step of {quoted(workload.model.name)} does not run: {_where(error)}") from error
    return tracker, depth


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


def read_estimate(
    workload: Workload, strategy: Strategy, events: Sequence[Event], storages: Mapping[int, Storage], num_scalars: int
) -> Estimate:
    """Return the estimate that a stream of allocations means on the workload's device."""
    moments = list_moments(events, storages)
    peak = max(moments, key=lambda moment: moment.total_bytes)
    reserved = replay(events, expandable=strategy.allocator == "expandable_segments")
    return Estimate(
        source="trace", moments=moments, peak_allocated_bytes=peak.total_bytes, peak_reserved_bytes=reserved,
        device_bytes=reserved + context_bytes(workload.cluster.device), peak_moment=peak.name,
        margin_bytes=margin_bytes("trace", peak.total_bytes), notes=_notes(workload, strategy, num_scalars),
    )  # fmt: skip


def replay(events: Iterable[Event], *, expandable: bool = False) -> int:
    """Return the most bytes the caching allocator reserves over a stream."""
    allocator = CachingAllocator(expandable=expandable)
    for event in events:
        if event.num_bytes > 0:
            allocator.allocate(event.key, event.num_bytes)
        elif event.num_bytes < 0:
            allocator.free(event.key)
    return allocator.peak_reserved_bytes


def list_moments(events: Iterable[Event], storages: Mapping[int, Storage]) -> tuple[Moment, ...]:
    """Return the highest point of each phase, in order of the step, with its ledger."""
    live: Counter[str] = Counter()
    total, best = 0, {}
    for event in events:
        if event.num_bytes:
            live[storages[event.key].category] += event.num_bytes
            total += event.num_bytes
        if event.phase != "model" and total > best.get(event.phase, (0, None))[0]:
            best[event.phase] = total, Counter(live)
    return tuple(Moment(name=name, ledger=_ledger(rows)) for name, (_, rows) in best.items())


def _ledger(live: Mapping[str, int]) -> Ledger:
    return Ledger(**{row: live.get(category, 0) for category, row in _ROWS.items()})


def _notes(workload: Workload, strategy: Strategy, num_scalars: int) -> tuple[str, ...]:
    import torch

    notes = [
        f"the model's own code on tensors without data, torch {torch.__version__.partition('+')[0]}",
        f"sized for micro-batches whose every sequence has {workload.data.seq_len:,} tokens",
        "two matrix library workspaces and the process's context come from tables, not from the trace",
    ]
    if strategy.gradient_accumulation_steps > 2:
        notes.append(f"micro-batches 3 to {strategy.gradient_accumulation_steps} repeat the second")
    if strategy.attention_kernel == "flash":
        notes.append("flash attention is PyTorch's own kernel, which keeps what the flash-attn package keeps")
    if num_scalars:
        notes.append(f"the number 1 stands in where code reads one from the device ({num_scalars} places)")
    if workload.recipe.engine.evaluates:
        notes.append("evaluation runs with the training micro-batch")
    return tuple(notes)

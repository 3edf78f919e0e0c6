"""A training step as the trainer runs it: what is alive when decides gigabytes.

Two optimizer steps of up to two micro-batches are run: the first makes the optimizer's states, the second is steady.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from brim.errors import MissingExtra, ProbeFailed
from brim.probes.checkpointing import offloads_saved_tensors
from brim.probes.dtypes import torch_dtype
from brim.probes.heads import explain_no_loss
from brim.probes.inputs import MakeInputs
from brim.probes.kernels import CudaAutocast
from brim.probes.loops import Loop, LossScaler, find_loop, make_scaler, takes_label_count
from brim.probes.offload import SavedTensors, spare_head
from brim.probes.optimizers import host_states, make_optimizer, paged_states, start_states
from brim.probes.phases import END_OF_STEP, EVALUATION, FIRST_STEP, FORWARD, LOSS_BACKWARD, OPTIMIZER_STEP
from brim.probes.preferences import pair_inputs, plan_preferences
from brim.probes.repeat import Stretch, can_repeat, repeat_stretch, take_stretch
from brim.probes.rows import flatten, row_masks, shares_rows
from brim.probes.watch import watch
from brim.spec.recipe import Recipe
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

Inputs = Mapping[str, Any]
Tracker = Any
"""A `StorageTracker`, or what answers to the same names and follows nothing (`follows` is false)."""

_CLIPPING_NORM = 1.0


@dataclass(slots=True)
class Step:
    """A model, its optimizer and its loop, ready to run: on tensors without data, or for real."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    make_inputs: MakeInputs
    workload: Workload
    strategy: Strategy
    tracker: Tracker
    loop: Loop
    reference: torch.nn.Module | None = None
    """A second model whose answers are compared with."""
    score_pairs: Callable[[Inputs], torch.Tensor] | None = None
    """Loss of a micro-batch of pairs; None where the model computes its own loss."""
    scaler: LossScaler | None = None
    """What scales the loss of fp16 runs."""
    saves: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """Context of forward and backward, which may move what is saved to the host."""
    counts_labels: bool = False
    """Whether the model is given the number of labels of the batch."""
    batches: list[Inputs] = field(default_factory=list)
    """Micro-batches on the device."""
    kept_loss: torch.Tensor | None = None
    """Loss of the last micro-batch, where the loop keeps it."""
    first: bool = True
    """Whether optimizer states are still to be made."""
    num_steps: int = 2
    """Optimizer steps: the first makes the optimizer's states, the second is steady."""
    repeats: bool = False
    """Whether the second step's micro-batches are copied from the first's, where they are alike."""
    loaded_at: int = 0
    """Event at which the first micro-batches of a step had been loaded, and those before were let go."""
    lost_at: int = 0
    """Event at which the first loss of a step took the place of the one before."""
    parts: dict[int, str] = field(default_factory=dict)
    """Phase that begins at an event, by its own name in the first step too."""
    most_micro_batches: int = 2
    """Micro-batches of an optimizer step that are run."""
    device_type: str = "cpu"
    """Where it runs; a card is imitated on the CPU unless it runs for real."""
    part: str = ""
    """Phase of the step, by its own name in the first step too."""
    ends_layers: int = 0
    """How many layers have run, when the last one has and nothing after it yet; else 0."""

    @property
    def recipe(self) -> Recipe:
        """The workload's recipe."""
        return self.workload.recipe

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches run per optimizer step: further ones of the same length repeat the second."""
        return min(self.strategy.gradient_accumulation_steps, self.most_micro_batches)

    def begin(self, phase: str) -> None:
        """Name the next phase; before the first optimizer step all phases are one."""
        self.part = phase
        self.parts[len(self.tracker.events)] = phase
        self.tracker.begin(FIRST_STEP if self.first and phase != OPTIMIZER_STEP else phase)


def plan_step(
    workload: Workload, strategy: Strategy, model: torch.nn.Module, make_inputs: MakeInputs, tracker: Tracker,
    reference: torch.nn.Module | None = None, *, device_type: str = "cpu",
) -> Step:  # fmt: skip
    """Return the step of a workload on a model.

    Args:
        workload: what is trained on what.
        strategy: how it is run.
        model: the model with its tensors.
        make_inputs: returns one micro-batch of sequences.
        tracker: what follows the storages, or times a step that runs for real.
        reference: the second model of a preference recipe.
        device_type: where the model is.
    """
    recipe, loop = workload.recipe, find_loop(workload.recipe)
    step = Step(
        model=model, optimizer=make_optimizer(model, recipe, strategy),
        make_inputs=flatten(pair_inputs(make_inputs, recipe), workload, strategy, model), workload=workload,
        strategy=strategy, tracker=tracker, loop=loop, reference=reference,
        scaler=make_scaler(recipe, device_type), device_type=device_type,
        counts_labels=loop.counts_labels and takes_label_count(model), first=not recipe.engine.resumes,
    )  # fmt: skip
    if recipe.preference is not None:
        step.score_pairs = plan_preferences(model, reference, recipe, strategy, lambda forward: _wrap(step, forward))
    if strategy.activation_offload and offloads_saved_tensors(recipe.engine):
        spare_head(model)
        step.saves = SavedTensors(model)
    return step


def note_step(workload: Workload, strategy: Strategy) -> list[str]:
    """Return what was assumed of the loop, one sentence each."""
    notes, recipe = [], workload.recipe
    if recipe.preference is not None:
        notes.append("every pair is two answers of the sequence length, all of whose tokens are scored")
    if recipe.engine.name.lower().startswith("unsloth"):
        notes.append("Unsloth's loop is taken for the HF Trainer's, which it inherits")
        if strategy.activation_offload:
            notes.append("layer inputs come back into two buffers, as Unsloth does where 512 MiB are free")
    if shares_rows(workload, strategy):
        notes.append("sequences of a micro-batch share one row")
    if recipe.engine.resumes:
        notes.append("the run goes on from a checkpoint: optimizer states are there before the first step")
    return notes


def run_steps(step: Step) -> None:
    """Run the optimizer steps, and an evaluation if the loop evaluates."""
    start_states(step.optimizer, resumes=step.recipe.engine.resumes)
    _label_states(step)
    with _imitate_card(step):
        stretch = None
        for _ in range(step.num_steps):
            if stretch is not None and can_repeat(step.tracker, stretch):
                repeat_stretch(step.tracker, stretch, step.begin)
            else:
                started = len(step.tracker.events)
                _accumulate(step)
                stretch = _take_stretch(step, started)
            _update(step)
            step.first = False
            step.tracker.begin(END_OF_STEP)
        if step.recipe.engine.evaluates:
            _evaluate(step)


@contextlib.contextmanager
def _imitate_card(step: Step) -> Iterator[None]:
    """Where storages are followed: modules tell that they run, masks and autocast are those of the target."""
    if not step.tracker.follows:
        yield
        return
    autocast = CudaAutocast() if step.recipe.autocast else contextlib.nullcontext()
    with watch(step), row_masks(step.workload, step.strategy), autocast:
        yield


def _take_stretch(step: Step, started: int) -> Stretch | None:
    """Return the micro-batches run since an event, where those of the next step will be alike; else None."""
    # A loss on pairs keeps scores of its own from micro-batch to micro-batch.
    loop_alike = step.repeats and step.score_pairs is None and step.recipe.engine.set_to_none
    alike = loop_alike and step.recipe.gradient_dtype is None
    if not alike:
        return None
    inputs = [one for batch in step.batches for one in batch.values() if isinstance(one, torch.Tensor)]
    releases = dict.fromkeys(step.tracker.keys_of(inputs), step.loaded_at)
    if step.kept_loss is not None:
        releases |= dict.fromkeys(step.tracker.keys_of([step.kept_loss]), step.lost_at)
    return take_stretch(step.tracker, started, step.parts, step.optimizer, releases)


def _accumulate(step: Step) -> None:
    """Run the micro-batches of an optimizer step. New ones are loaded while the loop still holds those before."""
    together = step.strategy.gradient_accumulation_steps if step.loop.holds_batches else 1
    count = None
    for index in range(step.num_micro_batches):
        if index == 0 or not step.loop.holds_batches:
            step.batches[:] = [_load(step) for _ in range(together)]
            step.loaded_at = step.loaded_at if index else len(step.tracker.events)
            count = _count_labels(step)
        _micro_batch(step, step.batches[min(index, together - 1)], count)
        step.lost_at = step.lost_at if index else len(step.tracker.events)


def _load(step: Step) -> Inputs:
    inputs = step.make_inputs()
    step.tracker.label([one for one in inputs.values() if isinstance(one, torch.Tensor)], "input")
    return inputs


def _count_labels(step: Step) -> torch.Tensor | None:
    """Source: transformers trainer.py _get_num_items_in_batch."""
    if not step.counts_labels or not all(isinstance(inputs.get("labels"), torch.Tensor) for inputs in step.batches):
        return None
    return sum(inputs["labels"][..., 1:].ne(-100).sum() for inputs in step.batches)  # type: ignore[return-value]


def _micro_batch(step: Step, inputs: Inputs, count: torch.Tensor | None) -> None:
    """Forward and backward of one micro-batch."""
    started = step.tracker.next_key
    step.begin(FORWARD)
    with step.saves():
        loss, held = _compute_loss(step, inputs, count)
        if not step.recipe.engine.logits_alive_in_backward:
            del held
        if count is None and step.num_micro_batches > 1:
            loss = loss / step.strategy.gradient_accumulation_steps
        step.tracker.label_live(started, "activation")
        step.begin(LOSS_BACKWARD)
        # Not loss.backward(): that would switch function modes off inside.
        torch.autograd.backward(loss if step.scaler is None else step.scaler.scale(loss))
    step.kept_loss = loss.detach() if step.loop.keeps_loss else None
    _label_gradients(step)


def _compute_loss(step: Step, inputs: Inputs, count: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """Return the loss of a micro-batch and the output of the model, if there is one."""
    if step.score_pairs is not None:
        return step.score_pairs(inputs), None
    if count is not None:
        inputs = {**inputs, "num_items_in_batch": count}
    outputs = _wrap(step, step.model)(**inputs)
    loss = _find_loss(outputs)
    if loss is None:
        raise ProbeFailed(explain_no_loss(step.model))
    return loss, outputs


def _find_loss(outputs: Any) -> torch.Tensor | None:
    """Source: transformers trainer.py compute_loss; a model of one's own may return any object with a loss."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    if isinstance(outputs, torch.Tensor):
        return outputs
    return outputs.loss if hasattr(outputs, "loss") else outputs[0]


def _wrap(step: Step, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward under the recipe's autocast, its output cast as the loop does."""
    if not step.recipe.autocast:
        return forward
    dtype = torch_dtype(step.recipe.compute_dtype)
    cast = _fp32_outputs() if step.loop.casts_outputs else lambda outputs: outputs

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(step.device_type, dtype):
            outputs = forward(*args, **kwargs)
        return cast(outputs)

    return run


def _fp32_outputs() -> Callable[[Any], Any]:
    """Source: accelerate utils/operations.py convert_outputs_to_fp32."""
    try:
        from accelerate.utils.operations import convert_to_fp32
    except ImportError:
        raise MissingExtra(package="accelerate", extra="trace", purpose="--by trace") from None
    return convert_to_fp32


def _update(step: Step) -> None:
    step.begin(OPTIMIZER_STEP)
    if step.loop.clips:
        if step.scaler is not None:
            step.scaler.unscale_(step.optimizer)
        trained = [parameter for group in step.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, _CLIPPING_NORM, foreach=True)
        step.begin(OPTIMIZER_STEP)  # what clipping made for a layer is no part of the update's pass over the layers
    if step.scaler is None:
        step.optimizer.step()
    else:
        step.scaler.step(step.optimizer)
        step.scaler.update()
    _label_states(step)
    step.optimizer.zero_grad(set_to_none=step.recipe.engine.set_to_none)


def _label_states(step: Step) -> None:
    for parameter, state in step.optimizer.state.items():
        tensors = [one for one in state.values() if isinstance(one, torch.Tensor)]
        step.tracker.label(tensors, "optimizer_state")
        step.tracker.call(tensors, step.tracker.name_of(parameter))
        step.tracker.tag(tensors, step.tracker.layer_of(parameter))
    step.tracker.label(paged_states(step.optimizer), "paged")
    step.tracker.move_to_host(host_states(step.optimizer))


def _evaluate(step: Step) -> None:
    """One step of evaluation with the training micro-batch, while the loop holds its last ones.

    Source: transformers trainer.py prediction_step: with no metrics asked for only the loss outlives the forward pass.
    """
    step.begin(EVALUATION)
    step.model.eval()
    inputs = _load(step)
    with torch.no_grad():
        _compute_loss(step, inputs, None)
    step.model.train()


def _label_gradients(step: Step) -> None:
    for parameter in (one for group in step.optimizer.param_groups for one in group["params"]):
        if parameter.grad is not None:
            step.tracker.label([parameter.grad], "gradient")
            step.tracker.call([parameter.grad], step.tracker.name_of(parameter))

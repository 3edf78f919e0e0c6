"""A training step as the trainer runs it: what is alive when decides gigabytes.

Two optimizer steps of up to two micro-batches are run: the first makes the optimizer's states, the second is steady.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from brim.probes.dtypes import torch_dtype
from brim.probes.inputs import MakeInputs
from brim.probes.kernels import CudaAutocast
from brim.probes.model import find_layers
from brim.probes.optimizers import make_optimizer
from brim.probes.tracker import StorageTracker
from brim.spec.recipe import Recipe
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

FIRST_STEP = "first step"
FORWARD, LOSS = "forward of layers", "loss"
LOSS_BACKWARD, BACKWARD = "loss backward", "backward of layers"
OPTIMIZER_STEP, EVALUATION = "optimizer step", "evaluation"

_OWN_LOOPS = ("accelerate", "plain")
_CLIPPING_NORM = 1.0
_MOST_MICRO_BATCHES = 2


@dataclass(slots=True)
class Step:
    """A model, its optimizer and its loop, ready to run."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    make_inputs: MakeInputs
    recipe: Recipe
    strategy: Strategy
    tracker: StorageTracker
    batches_ahead: int = 1
    """Micro-batches on the device while one runs, itself included."""
    clips: bool = False
    """Whether gradients are clipped to a norm."""
    first: bool = True
    """Whether optimizer states are still to be made."""
    part: str = ""
    """Phase of the step, by its own name in the first step too."""
    ends_layers: int = 0
    """How many layers have run, when the last one has and nothing after it yet; else 0."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches run per optimizer step: further ones repeat the second."""
        return min(self.strategy.gradient_accumulation_steps, _MOST_MICRO_BATCHES)

    def begin(self, phase: str) -> None:
        """Name the next phase; before the first optimizer step all phases are one."""
        self.part = phase
        self.tracker.begin(FIRST_STEP if self.first and phase != OPTIMIZER_STEP else phase)


def plan_step(
    workload: Workload, strategy: Strategy, model: torch.nn.Module, make_inputs: MakeInputs, tracker: StorageTracker
) -> Step:
    """Return the step of a workload on a model.

    Source: transformers trainer.py training_step; accelerate data_loader.py DataLoaderShard moves a batch ahead;
    `max_grad_norm` of TrainingArguments is 1.0.
    """
    name = workload.recipe.engine.name
    return Step(
        model=model, optimizer=make_optimizer(model, workload.recipe, strategy), make_inputs=make_inputs,
        recipe=workload.recipe, strategy=strategy, tracker=tracker,
        batches_ahead=1 if _loops_alone(name) else 2, clips=not _loops_alone(name) and not name.startswith(_OWN_LOOPS),
    )  # fmt: skip


def _loops_alone(engine: str) -> bool:
    return engine.startswith("plain")


def run_steps(step: Step) -> None:
    """Run two optimizer steps, and an evaluation if the loop evaluates."""
    upcoming = [_load(step) for _ in range(step.batches_ahead)]
    with _watched(step):
        for _ in range(2):
            for _ in range(step.num_micro_batches):
                _micro_batch(step, upcoming[0])
                upcoming.append(_load(step))
                del upcoming[0]
            _update(step)
            step.first = False
        if step.recipe.engine.evaluates:
            _evaluate(step, upcoming[0])


def _load(step: Step) -> Mapping[str, torch.Tensor]:
    inputs = step.make_inputs()
    step.tracker.label(inputs.values(), "input")
    return inputs


def _micro_batch(step: Step, inputs: Mapping[str, torch.Tensor]) -> None:
    """Forward and backward of one micro-batch."""
    engine, tracker = step.recipe.engine, step.tracker
    started = tracker.next_key
    step.begin(FORWARD)
    with _autocast(step.recipe):
        outputs = step.model(**inputs)
        loss = outputs.loss
        if step.num_micro_batches > 1:
            loss = loss / step.strategy.gradient_accumulation_steps
    if not engine.logits_alive_in_backward:
        del outputs
    tracker.label_live(started, "activation")
    step.begin(LOSS_BACKWARD)
    torch.autograd.backward(loss)  # not loss.backward(): that would switch function modes off inside
    tracker.label(_gradients(step), "gradient")


def _update(step: Step) -> None:
    step.begin(OPTIMIZER_STEP)
    if step.clips:
        trained = [parameter for group in step.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, _CLIPPING_NORM, foreach=True)
    step.optimizer.step()
    on_host = []
    for parameter, state in step.optimizer.state.items():
        tensors = [one for one in state.values() if isinstance(one, torch.Tensor)]
        step.tracker.label(tensors, "optimizer_state")
        step.tracker.tag(tensors, step.tracker.layer_of(parameter))
        if step.first and not step.optimizer.defaults["fused"]:
            on_host.append(state["step"])
    step.tracker.move_to_host(on_host)
    step.optimizer.zero_grad(set_to_none=step.recipe.engine.set_to_none)


def _evaluate(step: Step, inputs: Mapping[str, torch.Tensor]) -> None:
    step.begin(EVALUATION)
    step.model.eval()
    with torch.no_grad(), _autocast(step.recipe):
        outputs = step.model(**inputs)
    del outputs
    step.model.train()


def _gradients(step: Step) -> Iterator[torch.Tensor]:
    for group in step.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter.grad


@contextlib.contextmanager
def _autocast(recipe: Recipe) -> Iterator[None]:
    if not recipe.autocast:
        yield
        return
    with torch.autocast("cpu", torch_dtype(recipe.compute_dtype)):
        yield


@contextlib.contextmanager
def _watched(step: Step) -> Iterator[None]:
    """Tell the tracker which module runs, and where layers end and the loss begins, in both directions."""
    handles = []
    for name, module in step.model.named_modules():
        handles.append(module.register_forward_pre_hook(_entering(step, name)))
        handles.append(module.register_forward_hook(_leaving(step.tracker, name)))
    layers = find_layers(step.model)
    for index, layer in enumerate(layers or ()):
        handles.append(layer.register_forward_pre_hook(_entering_layer(step, index)))
    if layers is not None:
        handles.append(layers[len(layers) - 1].register_forward_hook(lambda *_: _end_layers(step, len(layers))))
    with CudaAutocast() if step.recipe.autocast else contextlib.nullcontext():
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _entering(step: Step, name: str) -> Callable[..., None]:
    def enter(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if step.ends_layers:
            _watch_gradient(step, inputs, step.ends_layers - 1)
            step.ends_layers = 0
        # Recomputation stops in the midst of a layer and leaves modules that never return.
        while step.tracker.modules and not name.startswith(f"{step.tracker.modules[-1]}."):
            step.tracker.modules.pop()
        step.tracker.modules.append(name)

    return enter


def _leaving(tracker: StorageTracker, name: str) -> Callable[..., None]:
    def leave(*_: Any) -> None:
        if tracker.modules and tracker.modules[-1] == name:
            tracker.modules.pop()

    return leave


def _entering_layer(step: Step, index: int) -> Callable[..., None]:
    """What follows belongs to this layer, until the next one begins; in the backward pass, once its input's gradient
    is there, to the layer before."""

    def enter(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if step.part in (FORWARD, EVALUATION):
            step.tracker.layer = index
        if step.part == FORWARD:
            _watch_gradient(step, inputs, index - 1)

    return enter


def _end_layers(step: Step, num_layers: int) -> None:
    """The last layer has run: what follows is the loss, unless this is recomputation in the backward pass."""
    if step.part == FORWARD:
        step.ends_layers = num_layers
        step.begin(LOSS)
    elif step.part == EVALUATION:
        step.tracker.layer = -1


def _watch_gradient(step: Step, inputs: tuple[Any, ...], layer: int) -> None:
    """From where this gradient arrives, the backward pass is in a layer; in the last one it leaves the loss."""

    def arrive(_: torch.Tensor) -> None:
        if step.part != BACKWARD:
            step.begin(BACKWARD)
        step.tracker.layer = layer

    for one in inputs:
        if isinstance(one, torch.Tensor) and one.requires_grad:
            one.register_hook(arrive)
            return

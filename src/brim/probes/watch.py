"""Where in the step an operator runs: which module, which of the repeated layers, which phase, in both directions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from brim.probes.model import find_layers
from brim.probes.phases import BACKWARD, EVALUATION, FORWARD, LOSS, REFERENCE
from brim.probes.tracker import StorageTracker

if TYPE_CHECKING:
    from brim.probes.step import Step


_Hook = Callable[..., None]


@contextlib.contextmanager
def watch(step: Step) -> Iterator[None]:
    """Tell the tracker which module runs, and where layers end and the loss begins, while the context lasts."""
    with contextlib.ExitStack() as stack:
        for handle in _register(step):
            stack.callback(handle.remove)
        yield


def _register(step: Step) -> Iterator[Any]:
    models = [step.model] if step.reference is None else [step.model, step.reference]
    for model in models:
        for name, module in model.named_modules():
            yield module.register_forward_pre_hook(_entering(step, name))
            yield module.register_forward_hook(_leaving(step.tracker, name))
        layers = find_layers(model)
        for index, layer in enumerate(layers or ()):
            yield layer.register_forward_pre_hook(_entering_layer(step, index))
        if layers is not None:
            yield layers[-1].register_forward_hook(_leaving_layers(step, len(layers)))
    if step.recipe.preference is not None:
        scored = models[-1]
        yield scored.register_forward_pre_hook(lambda *_: _begin_reference(step))
        yield scored.register_forward_hook(lambda *_: _end_reference(step))


def _begin_reference(step: Step) -> None:
    """The second forward pass of a micro-batch records no gradients."""
    if step.part in (FORWARD, LOSS) and not torch.is_grad_enabled():
        step.ends_layers = 0
        step.begin(REFERENCE)


def _end_reference(step: Step) -> None:
    if step.part == REFERENCE:
        step.begin(LOSS)


def _entering(step: Step, name: str) -> _Hook:
    def enter(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if step.ends_layers:
            _watch_gradient(step, inputs, step.ends_layers - 1)
            step.ends_layers = 0
        # Recomputation stops in the midst of a layer and leaves modules that never return.
        while step.tracker.modules and not name.startswith(f"{step.tracker.modules[-1]}."):
            step.tracker.modules.pop()
        step.tracker.modules.append(name)

    return enter


def _leaving(tracker: StorageTracker, name: str) -> _Hook:
    def leave(*_: Any) -> None:
        if tracker.modules and tracker.modules[-1] == name:
            tracker.modules.pop()

    return leave


def _entering_layer(step: Step, index: int) -> _Hook:
    """What follows belongs to this layer, until the next one begins; in the backward pass, once its input's gradient
    is there, to the layer before."""

    def enter(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if step.part in (FORWARD, REFERENCE, EVALUATION):
            step.tracker.layer = index
        if step.part == FORWARD:
            _watch_gradient(step, inputs, index - 1)

    return enter


def _leaving_layers(step: Step, num_layers: int) -> _Hook:
    """The last layer has run: what follows is the loss, unless this is recomputation in the backward pass."""

    def leave(*_: Any) -> None:
        if step.part == FORWARD:
            step.ends_layers = num_layers
            step.begin(LOSS)
        elif step.part in (REFERENCE, EVALUATION):
            step.tracker.layer = -1

    return leave


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

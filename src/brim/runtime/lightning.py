"""Exact accumulation in Lightning's automatic optimization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brim.errors import InvalidInput
from brim.losses.form import AuxiliaryTap, LossForm, list_coefficients
from brim.losses.measure import measure_form, refuse_batch_norm
from brim.runtime.ranks import gather_numbers, is_distributed, reduce_unused, share_inputs

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback
    except ModuleNotFoundError:
        Callback = object  # type: ignore[assignment, misc]

_QUIET = ("log", "log_dict")


class LightningExact(Callback):
    """Callback that makes `accumulate_grad_batches` exact.

        Trainer(accumulate_grad_batches=8, callbacks=[LightningExact()])

    Lightning hands out one micro-batch at a time, so nobody can count ahead: each loss gets n / n0, n0 being the terms
    of a typical micro-batch, and once the window is over its gradients get n0 x ranks / N. That is after they were
    reduced and unscaled and before they are clipped; callbacks that look at gradients there belong after this one.
    Auxiliary losses, whose share is known just as late, keep their gradients apart, which takes the memory of one more
    gradient.

    What `training_step` returns to Lightning is weighted; what it logs by itself is not.

    Works with one device, DDP, and FSDP2 (`ModelParallelStrategy` without tensor parallelism). Leaves out: strategies
    that keep gradients to themselves (FSDP1, DeepSpeed: refused), auxiliary losses under FSDP2 (refused: shards would
    not get their gradients), manual optimization (refused: there `brim.accumulate` does it).

    Args:
        model: attribute of the module that holds the network whose outputs show auxiliary losses.
        form: what the loss averages over, where it is known; measured in the first training step if None.
    """

    def __init__(self, *, model: str = "model", form: LossForm | None = None) -> None:
        super().__init__()
        self._name, self._form = model, form
        self._typical: int | None = None
        self._tap: AuxiliaryTap | None = None
        self._own_step: Callable[..., Any] | None = None
        self._forget_window()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the weight into the module's training step."""
        _refuse(trainer, pl_module)
        for part in pl_module.modules():
            reduce_unused(part)
        step = pl_module.training_step
        self._own_step = vars(pl_module).get("training_step")

        @wraps(step)
        def weighted_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return self._run_step(trainer, pl_module, step, batch, *args, **kwargs)

        pl_module.training_step = weighted_step

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start a window: Lightning ends one with each epoch."""
        self._forget_window()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Turn the window's gradients into those of the big batch. A collective: every rank steps together."""
        everyone = gather_numbers((self._num_terms, self._num_micro_batches), pl_module.device)
        terms, number = (sum(column) for column in zip(*everyone, strict=True))
        factor = self._typical * len(everyone) / terms if self._form.reduction == "mean" and terms else len(everyone)
        for parameter in _list_trained(pl_module):
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        self._add_auxiliary(number)
        self._forget_window()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the module its own training step back."""
        self._restore(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the module its own training step back."""
        self._restore(pl_module)

    def _run_step(
        self, trainer: Any, module: Any, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any
    ) -> Any:  # fmt: skip
        if not isinstance(batch, Mapping):
            kind = type(batch).__name__
            raise InvalidInput(f"LightningExact counts in named inputs; batches must be mappings, not {kind}")
        if self._typical is None:
            self._measure(module, step, batch, *args, **kwargs)
        count = int(self._form.rule.count(batch))
        found = step(batch if count else self._form.rule.add_term(batch), *args, **kwargs)
        loss = found["loss"] if isinstance(found, Mapping) else found
        parts = self._tap.take() if self._tap is not None else {}
        if loss is None:
            return found
        self._num_terms += count
        self._num_micro_batches += 1
        weight = count / self._typical if self._form.reduction == "mean" else 1.0
        share = (self._split_off(module, loss, parts)) * weight * trainer.accumulate_grad_batches
        return {**found, "loss": share} if isinstance(found, Mapping) else share

    def _measure(self, module: Any, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> None:
        """Find what the loss averages over, and what a typical micro-batch has of it, alike on every rank."""
        sample = share_inputs(batch, module.device)
        network = getattr(module, self._name, module)
        network = network if isinstance(network, nn.Module) else module
        refuse_batch_norm(module)

        def loss_of(inputs: Any) -> Tensor:
            found = step(inputs, *args, **kwargs)
            return found["loss"] if isinstance(found, Mapping) else found

        if self._form is None:
            with _Quiet(module):
                declared = list_coefficients(module, getattr(network, "config", None))
                self._form = measure_form(loss_of, network, sample, coefficients=declared)
        self._typical = max(int(self._form.rule.count(sample)), 1)
        if self._form.auxiliary:
            _refuse_auxiliary(module)
            self._tap = AuxiliaryTap(network)

    def _split_off(self, module: Any, loss: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the loss without its auxiliary part, and keep the gradient of that part."""
        part = self._form.sum_auxiliary(parts)
        if not isinstance(part, Tensor) or not part.requires_grad:
            return loss - part
        trained = _list_trained(module)
        for parameter, grad in zip(
            trained, torch.autograd.grad(part, trained, retain_graph=True, allow_unused=True), strict=True
        ):
            if grad is not None:
                kept = self._auxiliary.get(parameter)
                self._auxiliary[parameter] = grad if kept is None else kept.add_(grad)
        return loss - part

    def _add_auxiliary(self, number: float) -> None:
        for parameter, kept in self._auxiliary.items():
            if is_distributed():
                dist.all_reduce(kept)
            kept.div_(max(number, 1))
            parameter.grad = kept if parameter.grad is None else parameter.grad.add_(kept)

    def _forget_window(self) -> None:
        self._num_terms = self._num_micro_batches = 0
        self._auxiliary: dict[nn.Parameter, Tensor] = {}

    def _restore(self, module: Any) -> None:
        vars(module).pop("training_step", None)
        if self._own_step is not None:
            module.training_step = self._own_step
        if self._tap is not None:
            self._tap.remove()
        self._tap = self._typical = self._own_step = None
        self._forget_window()


class _Quiet:
    """While entered, a module's `log` and `log_dict` do nothing: measuring is no training step."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __enter__(self) -> None:
        self._kept = {name: vars(self._module)[name] for name in _QUIET if name in vars(self._module)}
        for name in _QUIET:
            setattr(self._module, name, lambda *args, **kwargs: None)

    def __exit__(self, *error: Any) -> None:
        for name in _QUIET:
            vars(self._module).pop(name, None)
        vars(self._module).update(self._kept)


def _list_trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _refuse(trainer: Any, module: Any) -> None:
    if not module.automatic_optimization:
        raise InvalidInput("LightningExact needs automatic optimization; in your own loop use brim.accumulate")
    strategy = type(trainer.strategy).__name__
    if trainer.strategy.handles_gradient_accumulation or any(word in strategy for word in ("FSDP", "XLA")):
        raise InvalidInput(
            f"{strategy} keeps gradients to itself; LightningExact works with one device, DDP and ModelParallelStrategy"
        )
    size = trainer.strategy.device_mesh["tensor_parallel"].size() if _is_sharded(trainer) else 1
    if size > 1:
        raise InvalidInput(
            f"tensor parallelism over {size} ranks shares rows between ranks, which cannot be counted yet"
        )


def _is_sharded(trainer: Any) -> bool:
    """Return whether the strategy leaves it to the module to shard itself by FSDP2."""
    return type(trainer.strategy).__name__ == "ModelParallelStrategy"


def _refuse_auxiliary(module: Any) -> None:
    if _is_sharded(module.trainer):
        raise InvalidInput(
            "auxiliary losses under FSDP2: their gradients are kept apart, and the shards would not get them; use DDP, "
            "brim.accumulate in a loop of your own, or switch the auxiliary loss off"
        )

"""Exact accumulation inside Hugging Face's training loop, as a mixin over any trainer class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor

from brim.errors import InseparableLoss, InvalidInput
from brim.losses.form import AuxiliaryTap, LossForm
from brim.runtime.accelerate_loop import divides_by
from brim.runtime.ranks import gather_head, gather_numbers, reduce_unused
from brim.runtime.trainer_loop import measure_trainer, steps_when_short
from brim.runtime.window import Window, open_window


class ExactAccumulation:
    """Mixin that makes a `transformers.Trainer` exact: `class Mine(brim.ExactAccumulation, SFTTrainer)`.

    `get_batch_samples` counts the window that it fetched; `compute_loss` asks the trainer for the plain mean of a
    micro-batch and weights it; `training_step` runs backward from that, whatever its release divides by.

    Leaves out: context and sequence parallelism, where a rank sees a part of each row, and DataParallel: refused.
    """

    _exact_form: LossForm | None = None
    _exact_window: Window | None = None
    _exact_index: int = -1
    _exact_share: Tensor | None = None
    _exact_auxiliary: AuxiliaryTap | None = None
    _exact_evaluated: list[tuple[Tensor, Tensor]] | None = None

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any) -> tuple[list[Any], None]:
        """Return the micro-batches of one optimizer step, counted over all ranks.

        A window that the loop would leave without a step, at the end of a stream whose length nobody knows, is filled
        up with micro-batches of weight 0. So is that of a rank that has fewer than the others.
        """
        steps = self.args.gradient_accumulation_steps
        batches, _ = super().get_batch_samples(epoch_iterator, steps, *args)
        if self._exact_form is None:
            self._exact_form = measure_trainer(self, batches)
        self._exact_window = open_window(self._exact_form, batches, self.args.device)
        self._exact_index = -1
        self._exact_keep_auxiliary()
        reduce_unused(self.model)
        wanted = self._exact_window.most_micro_batches
        if 0 < wanted < steps and not steps_when_short(self):
            wanted = steps
        if batches:
            return [*batches, *[batches[-1]] * (wanted - len(batches))], None
        return [], None

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch; return its share of the window's loss."""
        if self._exact_window is None:
            return super().training_step(model, inputs, *args, **kwargs)
        self._exact_index += 1
        gather_head(self.model)
        with self._exact_backward():
            super().training_step(model, self._exact_window.prepare(self._exact_index, inputs), *args, **kwargs)
        share, self._exact_share = self._exact_share, None
        if share is None:
            raise InvalidInput(f"{type(self).__name__} computes no loss in a training step; guard cannot make it exact")
        return share.detach()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Return the loss; while training its share of the window's."""
        kwargs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        found = super().compute_loss(model, inputs, return_outputs, **kwargs)
        if self._exact_index < 0 or self._exact_window is None or not self.model.training:
            return found
        loss = found[0] if return_outputs else found
        parts = self._exact_auxiliary.take() if self._exact_auxiliary is not None else {}
        self._exact_share = self._exact_window.scale(self._exact_index, loss, parts)
        theirs = self._exact_share.clone()  # some releases multiply what they get in place
        return (theirs, found[1]) if return_outputs else theirs

    def prediction_step(self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the predictions of one evaluation batch; note its loss and what it averages over."""
        found = super().prediction_step(model, inputs, *args, **kwargs)
        if self._exact_evaluated is None or not isinstance(found[0], Tensor) or found[0].dim():
            return found
        if self._exact_form is None:
            with suppress(InseparableLoss):  # then nothing is better than what the trainer says
                self._exact_form = measure_trainer(self, [inputs])
        if self._exact_form is not None:
            self._exact_evaluated.append((found[0].detach(), self._exact_form.rule.count(inputs)))
        return found

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Return the evaluation, with a loss that does not depend on how the set was cut into batches."""
        self._exact_evaluated = []
        found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        pairs, self._exact_evaluated = self._exact_evaluated, None
        terms = [(float(loss) * int(count), int(count)) for loss, count in pairs if int(count)]
        everyone = gather_numbers((sum(t for t, _ in terms), sum(n for _, n in terms)), self.args.device)
        total, number = (sum(column) for column in zip(*everyone, strict=True))
        if number and self._exact_form is not None and self._exact_form.reduction == "mean":
            found.metrics[f"{metric_key_prefix}_loss"] = total / number
        return found

    def forget_window(self) -> None:
        """Take back what the guard has put on the model and the trainer."""
        if self._exact_auxiliary is not None:
            self._exact_auxiliary.remove()
        for name in [name for name in vars(self) if name.startswith("_exact_")]:
            delattr(self, name)

    def _exact_keep_auxiliary(self) -> None:
        if self._exact_form is not None and self._exact_form.auxiliary and self._exact_auxiliary is None:
            self._exact_auxiliary = AuxiliaryTap(self.model)

    @contextmanager
    def _exact_backward(self) -> Iterator[None]:
        """While entered, backward runs from the share, however the loop has scaled it on the way."""
        accelerator = self.accelerator
        theirs, kept = accelerator.backward, vars(accelerator).get("backward")

        def backward(loss: Tensor, **kwargs: Any) -> None:
            theirs(loss if self._exact_share is None else self._exact_share * divides_by(accelerator), **kwargs)

        accelerator.backward = backward
        try:
            yield
        finally:
            if kept is None:
                del accelerator.backward
            else:
                accelerator.backward = kept

"""Exact accumulation in a loop written with Hugging Face Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from brim.errors import InvalidInput
from brim.losses.form import AuxiliaryTap, LossForm
from brim.runtime.accumulate import Inputs, find_device, measure_model, unwrap_model
from brim.runtime.ranks import reduce_unused
from brim.runtime.window import Window, open_window


def divides_by(accelerator: Any) -> int:
    """Return what `accelerator.backward` divides a loss by. Source: accelerate/accelerator.py, `backward`."""
    return 1 if _is_engine(accelerator, "DEEPSPEED") else accelerator.gradient_accumulation_steps


@contextmanager
def exact_accelerate(
    accelerator: Any, model: nn.Module, loader: Iterable[Inputs], *, loss: Callable[[Inputs], Tensor] | None = None,
    form: LossForm | None = None, group: Any = None,
) -> Iterator[AccelerateBatches]:  # fmt: skip
    """Make an Accelerate loop exact; iterate over what this gives instead of the loader, as often as there are epochs.

        with brim.exact_accelerate(accelerator, model, loader) as batches:
            for batch in batches:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()

    The micro-batches of a window are fetched before the first of them is handed out, so that their terms are counted;
    gradients are reduced and the optimizer steps with the last one, also where an epoch ends inside a window. A rank
    that has fewer micro-batches than another repeats its last one with weight 0. On exit the accelerator is as before.

    Leaves out: sequences that Accelerate's `even_batches` repeats count like others (3 real sequences and 1 repeated:
    the mean of 4); DeepSpeed is asked not to divide by its own number of steps, which is not measured here.

    Args:
        accelerator: with `gradient_accumulation_steps`, read anew for each window.
        model: what `accelerator.prepare` returned.
        loader: micro-batches as keyword arguments of the model; prepared or not, with a length or without.
        loss: returns the loss of a micro-batch, where it is not `model(**inputs).loss`.
        form: what the loss averages over, where it is known; measured on the first micro-batch if None.
        group: data-parallel process group; the default one if None.

    Raises:
        InvalidInput: a second loader at the same time, ranks that share rows, windows that reach over the end of an
            epoch, batches without names.
        InseparableLoss: while iterating, if the loss is no weighted mean of its micro-batches' losses.
    """
    _refuse(accelerator)
    batches = AccelerateBatches(accelerator, model, loader, loss=loss, form=form, group=group)
    backward, replaced = accelerator.backward, "backward" in vars(accelerator)
    accelerator.backward = lambda loss, **kwargs: batches.run_backward(backward, loss, **kwargs)
    accelerator._do_sync = batches.set_sync
    try:
        yield batches
    finally:
        del accelerator.backward, accelerator._do_sync
        if replaced:  # by somebody before
            accelerator.backward = backward
        batches.close()


class AccelerateBatches:
    """The micro-batches of a loader, a window at a time, and the weight of the one that was handed out last."""

    def __init__(
        self, accelerator: Any, model: nn.Module, loader: Iterable[Inputs], *, loss: Any, form: LossForm | None,
        group: Any,
    ) -> None:  # fmt: skip
        self._accelerator, self._model, self._loader = accelerator, model, loader
        self._loss, self._form, self._group = loss, form, group
        self._window: Window | None = None
        self._index = 0
        self._tap: AuxiliaryTap | None = None

    def __len__(self) -> int:
        """Return how many micro-batches the loader has on this rank."""
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Inputs]:
        """Yield the micro-batches of one epoch."""
        source, spare = iter(self._loader), None
        while True:
            fetched = self._fetch(source)
            batches = [batch for batch, _ in fetched]
            self._window = self._open(batches)
            if not self._window.most_micro_batches:
                break
            spare = fetched[-1] if fetched else spare
            yield from self._hand_out(self._window, fetched, spare)
        self._window = None

    def run_backward(self, theirs: Callable[..., None], loss: Tensor, **kwargs: Any) -> None:
        """Run Accelerate's own backward from the share that a micro-batch has in its window."""
        if self._window is None:
            return theirs(loss, **kwargs)
        parts = self._tap.take() if self._tap is not None else {}
        share = self._window.scale(self._index, loss, parts)
        if _is_engine(self._accelerator, "DEEPSPEED"):
            kwargs.setdefault("scale_wrt_gas", False)
        return theirs(share * divides_by(self._accelerator), **kwargs)

    def set_sync(self, *args: Any, **kwargs: Any) -> None:
        """Let gradients be reduced, and the optimizer step, with the last micro-batch of a window and no other."""
        last = self._window is None or self._index == self._window.most_micro_batches - 1
        self._accelerator.step = 0 if last else self._index + 1
        self._accelerator.gradient_state._set_sync_gradients(last)

    def close(self) -> None:
        """Take off the model what reads its auxiliary losses."""
        self._window = None
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def _fetch(self, source: Iterator[Inputs]) -> list[tuple[Inputs, bool]]:
        """Return the next window, and of each micro-batch whether the loader called it its last.

        A prepared loader says so, and is not asked again before that one was handed out: it would take itself off
        Accelerate's list of loaders that are being read, and metrics gathered in the loop would count repeated rows.
        """
        fetched: list[tuple[Inputs, bool]] = []
        while len(fetched) < self._accelerator.gradient_accumulation_steps and not (fetched and fetched[-1][1]):
            batch = next(source, None)
            if batch is None:
                break
            if not isinstance(batch, Mapping):
                raise InvalidInput(
                    f"batches must be keyword arguments of the model, not {type(batch).__name__}; "
                    "let collate_fn return a dict"
                )
            fetched.append((batch, bool(getattr(self._loader, "end_of_dataloader", False))))
        return fetched

    def _open(self, batches: list[Inputs]) -> Window:
        device = find_device(self._model)
        reduce_unused(self._model)
        if self._form is None:
            self._form = measure_model(self._model, self._loss, batches, None, self._group)
        if self._form.auxiliary and self._tap is None:
            self._tap = AuxiliaryTap(unwrap_model(self._model))
        return open_window(self._form, batches, device, self._group)

    def _hand_out(
        self, window: Window, fetched: list[tuple[Inputs, bool]], spare: tuple[Inputs, bool] | None
    ) -> Iterator[Inputs]:
        if spare is None:
            raise InvalidInput("this rank has no micro-batch at all while others have; give every rank at least one")
        for index in range(window.most_micro_batches):
            inputs, ends = fetched[index] if index < len(fetched) else spare
            if hasattr(self._loader, "end_of_dataloader"):
                self._loader.end_of_dataloader = ends  # as if it had been read one by one
            self._index = index
            yield window.prepare(index, inputs)


def _is_engine(accelerator: Any, name: str) -> bool:
    return str(accelerator.distributed_type).endswith(name)


def _refuse(accelerator: Any) -> None:
    if "_do_sync" in vars(accelerator):
        raise InvalidInput("this accelerator counts the micro-batches of a loader already; leave that block first")
    if not accelerator.gradient_state.sync_with_dataloader:
        raise InvalidInput(
            "sync_with_dataloader=False lets a window reach over the end of an epoch, where nobody can count ahead; "
            "leave it on, or chain the epochs into one loader"
        )
    if _is_engine(accelerator, "MEGATRON_LM"):
        raise InvalidInput("Megatron-LM runs its own loop; exact_accelerate cannot weight its micro-batches")
    for kind in ("cp", "sp", "tp"):
        size = getattr(getattr(accelerator, "parallelism_config", None), f"{kind}_size", None) or 1
        if size > 1:
            raise InvalidInput(f"{kind} over {size} ranks shares rows between ranks, which cannot be counted yet")

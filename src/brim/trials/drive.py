"""A Hugging Face trainer driven for a few optimizer steps: its own loop, timed, and nothing written anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from brim.devices.meter import Meter
from brim.trials.batches import count_real


class _Stopwatch(TrainerCallback):
    """Times every optimizer step, the device's work in it done."""

    def __init__(self, meter: Meter) -> None:
        self.seconds: list[float] = []
        self._meter, self._since = meter, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.wait()
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.wait()
        self.seconds.append(time.perf_counter() - self._since)


class TrainerRun:
    """A trainer whose own loop is run for a few steps on rows of the greatest length."""

    def __init__(
        self, trainer: Any, meter: Meter, *, rows: Callable[[int], Any], longest_tokens: int, waiting: int = 0,
        notes: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Take a trainer that has not trained yet, and keep it from writing.

        Args:
            trainer: transformers', or one of its kin.
            meter: counters of its device.
            rows: returns a dataset of so many rows.
            longest_tokens: tokens of each.
            waiting: micro-batches of the strategy's step beyond those that are run; the loop loads them all at once.
            notes: what was assumed.
        """
        self.trainer, self.longest_tokens, self.notes = trainer, longest_tokens, notes
        self._meter, self._rows, self._waiting = meter, rows, waiting
        self._collated: Any = None
        hush(trainer)

    def train(self, num_micro_batches: int, num_steps: int) -> list[float]:
        """Run optimizer steps and return the seconds of each."""
        trainer, args = self.trainer, self.trainer.args
        args.gradient_accumulation_steps, args.max_steps = num_micro_batches, num_steps
        trainer.accelerator.gradient_accumulation_steps = num_micro_batches
        per_micro = args.per_device_train_batch_size * args.world_size
        trainer.train_dataset = self._rows(per_micro * num_micro_batches * num_steps)
        held = [self._load() for _ in range(self._waiting)]
        watch = _Stopwatch(self._meter)
        trainer.callback_handler.callbacks = [DefaultFlowCallback(), watch]
        trainer.train()
        del held
        return watch.seconds

    def _load(self) -> Any:
        """Return a micro-batch on the device, as it waits for its turn."""
        return self.trainer._prepare_inputs(self._collate())

    def _collate(self) -> Any:
        if self._collated is None:
            self._collated = next(iter(self.trainer.get_train_dataloader()))
        return self._collated

    def count_real(self) -> float:
        """Return the share of tokens that are no padding."""
        return count_real(self._collate())


def hush(trainer: Any) -> None:
    """Keep a trainer from saving, evaluating, logging or pushing, whatever its arguments say."""
    args = trainer.args
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        setattr(args, name, type(getattr(args, name))("no"))
    args.do_eval = args.load_best_model_at_end = args.push_to_hub = args.auto_find_batch_size = False
    args.report_to, args.disable_tqdm, args.dataloader_num_workers = [], True, 0
    args.skip_memory_metrics, args.resume_from_checkpoint = True, None

"""Subjects that a Hugging Face trainer trains: stock or guarded, yours or built here."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from brim import versions
from brim.checks.accumulation import WINDOW, Split, Subject
from brim.checks.fsdp2 import sharding_on_cpu
from brim.checks.gradients import CaptureOptimizer
from brim.checks.report import FULL, SMALL
from brim.checks.silence import silenced
from brim.checks.small import copy_model, quiet, shrink_model
from brim.errors import InvalidInput
from brim.losses.form import list_coefficients
from brim.losses.rules import IGNORED

_PACKAGES = ("torch", "transformers", "accelerate", "trl", "peft", "lightning")
_NEVER_CLIPS = 1e30
FIX = "trainer = brim.guard(trainer)"
_OLDEST_GUARDED = (4, 46)


def read_trainer(
    make_trainer: Callable[[], Any], *, prepare: Callable[[Any], Any] | None = None, num_ranks: int = 1,
    sharding: str = "ddp", shrink: bool = True,
) -> Subject:  # fmt: skip
    """Return what a trainer trains as a subject: its own class, collator and dataset.

    Args:
        make_trainer: returns a trainer as the user's script makes it; called once for each split.
        prepare: what is done to each trainer before it trains, such as `brim.guard`.
        num_ranks: data-parallel ranks; this process is one of them.
        sharding: ddp, or fsdp2 as Accelerate does it for the trainer, where there are several ranks; a trainer that was
            given FSDP2 gets it anyway.
        shrink: whether the model is replaced by a small copy of its class.

    Raises:
        InvalidInput: no trainer, or a dataset with too few sequences.
    """
    first = _made(make_trainer)
    model = shrink_model(first.model) if shrink else quiet(first.model)
    rows = pick_rows(first.train_dataset, num_ranks)
    first.model = model
    if shrink:
        _stay_in_fp32(first)
    collate = _collator(first)

    def run(split: Split) -> list[Tensor]:
        trainer = _set_up(_made(make_trainer), copy_model(model), rows, split)
        if shrink:
            _stay_in_fp32(trainer)
        prepared = trainer if prepare is None else prepare(trainer)
        with silenced(), _sharding(trainer) if shards else nullcontext():
            prepared.train()
        return trainer.optimizer_of_brim.captured

    sharding = "fsdp2" if _asks_for_fsdp2(first) else sharding
    shards = num_ranks > 1 and sharding == "fsdp2"

    return Subject(
        name=f"{_name_model(model)} under {type(first).__name__}{place_of(num_ranks, sharding)}", model=model,
        rows=rows, collate=collate, loss_of=lambda module, inputs: _plain_loss(first, module, inputs), run=run,
        fix=name_fix(version("transformers")), num_ranks=num_ranks, versions=list_versions(),
        coefficients=tuple(list_coefficients(first, getattr(first.model, "config", None))),
        precision="fp32" if shrink else _precision(first), size=SMALL if shrink else FULL,
    )  # fmt: skip


@contextmanager
def _sharding(trainer: Any) -> Iterator[None]:
    """While entered, a trainer takes itself for one that was given FSDP, and its accelerator shards on the CPU."""
    trainer.is_fsdp_enabled = True
    with sharding_on_cpu(trainer.accelerator, trainer.model):
        yield


def _asks_for_fsdp2(trainer: Any) -> bool:
    """Return whether a trainer's own arguments say FSDP2: on the CPU it would be left out."""
    return (getattr(trainer.args, "fsdp_plugin_args", None) or {}).get("fsdp_version") == 2


def place_of(num_ranks: int, sharding: str) -> str:
    """Return where a subject runs, to be put behind its name; nothing where that is one process."""
    return f" on {num_ranks} ranks ({sharding})" if num_ranks > 1 else ""


def _precision(trainer: Any) -> str:
    """Return whether gradients are as sharp as fp32 or as coarse as bf16."""
    short = {torch.bfloat16, torch.float16} & {parameter.dtype for parameter in trainer.model.parameters()}
    return "bf16" if short or trainer.args.bf16 or trainer.args.fp16 else "fp32"


def name_fix(release: str) -> str:
    """Return the line that makes a trainer of some release of transformers exact; old ones leave no place for it."""
    old = tuple(int(part) for part in release.split(".")[:2]) < _OLDEST_GUARDED
    return f"transformers {release} cannot be guarded: with 4.46 or later, {FIX}" if old else FIX


def _stay_in_fp32(trainer: Any) -> None:
    """Let a trainer whose arguments say bf16 or fp16 train its small copy in fp32: that is what its limits are for."""
    trainer.accelerator.native_amp, trainer.accelerator.scaler = False, None


def pick_rows(dataset: Any, num_ranks: int) -> list[Any]:
    """Return a full and a partial window of a dataset, the sequences that differ most in length among the first 256.

    Equal counts would hide that means are averaged. Under several ranks the partial window is a multiple of them, since
    loaders fill it up with repeated sequences otherwise.
    """
    partial = 3 if num_ranks == 1 else 4 if num_ranks <= 4 else num_ranks
    wanted = WINDOW + partial
    rows = _first_rows(dataset, 256)
    if len(rows) < wanted:
        raise InvalidInput(f"verify needs {wanted} sequences to fill a whole and a partial window, not {len(rows)}")
    order = sorted(range(len(rows)), key=lambda index: _count_targets(rows[index]))
    places = [order[round(step * (len(order) - 1) / (wanted - 1))] for step in range(wanted)]
    places = [places[(5 * step) % wanted] for step in range(wanted)] if wanted % 5 else places
    return [rows[place] for place in places]


def list_versions() -> tuple[tuple[str, str], ...]:
    """Return the releases of the packages that take part."""
    return versions.list_versions(_PACKAGES)


def _made(make_trainer: Callable[[], Any]) -> Any:
    import transformers

    with silenced():
        trainer = make_trainer()
    if not isinstance(trainer, transformers.Trainer):
        raise InvalidInput(f"the factory must return a transformers.Trainer, not {type(trainer).__name__}")
    return trainer


def _first_rows(dataset: Any, most: int) -> list[Any]:
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__getitem__"):
        return [row for _, row in zip(range(most), dataset, strict=False)]
    return [dataset[index] for index in range(min(most, len(dataset)))]


def _count_targets(row: Any) -> int:
    """Return how many targets a sequence has, or how long it is."""
    if not isinstance(row, Mapping):
        return 0
    labels = row.get("labels")
    if isinstance(labels, (list, tuple)) or (isinstance(labels, Tensor) and labels.dim()):
        return int(torch.as_tensor(labels).ne(IGNORED).sum())
    sized = [len(value) for value in row.values() if isinstance(value, (list, tuple, str)) or _has_rows(value)]
    return max(sized, default=0)


def _has_rows(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _collator(trainer: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
    """Return the collator as the trainer's own loader uses it, columns that the model does not take removed."""
    loader = trainer.get_train_dataloader()
    collate = loader.collate_fn
    return lambda rows: trainer._prepare_inputs(dict(collate(copy.deepcopy(rows))))


def _plain_loss(trainer: Any, model: Any, inputs: Mapping[str, Any]) -> Tensor:
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        return trainer.compute_loss(model, {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()})


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return copy.deepcopy(self._rows[index])


class _Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(copy.deepcopy(list(self._rows)))


def _set_up(trainer: Any, model: Any, rows: Sequence[Any], split: Split) -> Any:
    """Return a trainer that trains one epoch of the rows in order and keeps the gradient of each step."""
    streams = isinstance(trainer.train_dataset, torch.utils.data.IterableDataset)
    trainer.train_dataset = _Stream(rows) if streams else _Rows(rows)
    trainer.model = trainer.model_wrapped = model.train()
    optimizer = CaptureOptimizer(parameter for parameter in model.parameters() if parameter.requires_grad)
    trainer.optimizer, trainer.optimizer_of_brim = optimizer, optimizer
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer._get_train_sampler = lambda *_, **__: torch.utils.data.SequentialSampler(trainer.train_dataset)
    _set_arguments(trainer, split, steps=-(-len(rows) // WINDOW))
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ != "DefaultFlowCallback":
            trainer.remove_callback(callback)
    return trainer


def _set_arguments(trainer: Any, split: Split, *, steps: int) -> None:
    arguments = trainer.args
    values = {
        "per_device_train_batch_size": split.micro_batch_size, "auto_find_batch_size": False, "max_steps": steps,
        "gradient_accumulation_steps": split.accumulation_steps, "max_grad_norm": _NEVER_CLIPS,
        "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "output_dir": os.path.join(tempfile.gettempdir(), "brim-verify"), "dataloader_drop_last": False,
        "group_by_length": False, "train_sampling_strategy": "random",
    }  # fmt: skip
    for name, value in values.items():
        if hasattr(arguments, name):
            object.__setattr__(arguments, name, value)
    trainer.create_accelerator_and_postprocess()  # some releases tell accelerate how many steps to divide by
    trainer._train_batch_size = split.micro_batch_size
    trainer.state.train_batch_size = split.micro_batch_size


def _name_model(model: Any) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    wrapper = f"{type(model).__name__} of " if base is not model else ""
    return wrapper + type(base).__name__

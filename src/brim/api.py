"""The verbs end to end: read what is outside, let the planner choose, write it down."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brim.errors import InvalidFile, InvalidInput, UnknownName, quoted
from brim.planner.answerer import Answerer, answer_by_formula, answer_by_rule
from brim.planner.candidates import check_strategy, list_variants
from brim.planner.document import describe_estimate, describe_estimates, describe_plan, read_plan, schema
from brim.planner.job import Job, build_job
from brim.planner.options import JobOptions, read_options
from brim.planner.plan import plan_workload
from brim.planner.record import Plan
from brim.spec.model import ModelShape
from brim.spec.strategy import Strategy
from brim.tables.read import find_link, find_optimizer, find_task, find_trainer

if TYPE_CHECKING:
    from brim.cost.ledger import Estimate
    from brim.exporters.record import Export

__all__ = [
    "describe_estimate", "describe_estimates", "describe_plan", "estimate", "export", "load_plan", "plan",
    "save_plan", "schema",
]  # fmt: skip

_ANSWERERS: Mapping[str, Callable[[], Answerer]] = {"rule": answer_by_rule, "formula": answer_by_formula}
_LARGEST_PLAN_BYTES = 50_000_000


def plan(model: str | ModelShape, **options: Any) -> Plan:
    """Return the training strategy that fits, is fastest, and keeps the effective batch exactly.

    Args:
        model: a folder or config.json, a hub id, a bare size such as `7B`, or a shape already read.
        options: fields of `brim.planner.options.JobOptions`; what is left out becomes an assumption of the plan.

    Raises:
        DoesNotFit: nothing fits; `relaxations` says what would.
        BrimError: input that cannot be meant; the text says what would work.
    """
    from brim import __version__

    said = read_options(options)
    job = _read_job(model, said)
    answerer = _find_answerer(said.by or "formula")
    return plan_workload(job.workload, job.fixed, answerer, assumptions=job.assumptions, brim_version=__version__)


def estimate(model: str | ModelShape, *, by: Sequence[str] = ("formula",), **options: Any) -> tuple[Estimate, ...]:
    """Return what one way of running costs, one estimate per answerer.

    What is not said stands as the trainer has it: micro-batch 1, no accumulation, its own checkpointing.

    Args:
        model: as for `plan`.
        by: answerers, `rule` and `formula`.
        options: as for `plan`; `micro_batch_size` and `gradient_accumulation_steps` say what is costed.

    Raises:
        BrimError: input that cannot be meant, or knobs that exclude each other.
    """
    said = read_options(options)
    if not by or isinstance(by, str):
        raise InvalidInput(f"by must be a list of answerers such as ('rule', 'formula'), not {quoted(by)}")
    answerers = [_find_answerer(name) for name in by]
    job = _read_job(model, _with_default_split(said))
    strategy = _stated_strategy(job)
    return tuple(answerer.estimate(job.workload, strategy) for answerer in answerers)


def export(plan: Plan, target: str, *, version: str | None = None) -> Export:
    """Return the plan in the words of a framework: keywords, files, launch line.

    Args:
        plan: what `plan` or `load_plan` returned.
        target: trl, transformers, unsloth, accelerate or deepspeed.
        version: release of the target to write for, for example `0.20`; the newest if None.

    Raises:
        UnknownName: no such target or release. Inexpressible: the target has no word for a setting of the plan.
    """
    from brim.exporters import export_plan

    return export_plan(plan, target, version=version)


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write the plan as JSON: whole or not at all.

    Raises:
        InvalidFile: the folder is missing or cannot be written to.
    """
    write_text(path, json.dumps(describe_plan(plan), indent=2) + "\n")


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Return the plan a file holds, checked.

    Raises:
        InvalidFile: the file is missing, no regular file, too large, broken, of a newer schema, or it names an
            optimizer, trainer or task that no table has.
    """
    from brim.readers.regular_file import open_regular

    name = os.fspath(path)
    with open_regular(name) as (file, _):
        raw = file.read(_LARGEST_PLAN_BYTES + 1)
    if len(raw) > _LARGEST_PLAN_BYTES:
        raise InvalidFile(path=name, problem=f"is larger than {_LARGEST_PLAN_BYTES:,} bytes; no plan is")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidFile(path=name, problem="cannot be read: not UTF-8 text") from None
    loaded = read_plan(text, path=name)
    try:
        _check_names(loaded)
    except UnknownName as error:
        raise InvalidFile(path=name, problem=str(error)) from None
    return loaded


def _check_names(plan: Plan) -> None:
    """Raise UnknownName if a plan names what no table has."""
    workload = plan.workload
    find_optimizer(workload.recipe.optimizer)
    find_trainer(workload.recipe.engine.name)
    find_task(workload.task)
    if workload.cluster.device.link is not None:
        find_link(workload.cluster.device.link)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all: a temporary file beside it, then one rename.

    A link is followed; a device or pipe is written to as it is, since a rename would replace it.

    Raises:
        InvalidFile: the folder is missing or cannot be written to.
    """
    try:
        target = Path(path).resolve()
        if target.is_dir():
            raise IsADirectoryError(21, "is a folder")
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
        else:
            _replace_file(target, text)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidFile(path=os.fspath(path), problem=_what_failed(error, "cannot be written")) from None


def _replace_file(target: Path, text: str) -> None:
    import tempfile  # 10 ms that a plan which is only printed need not pay

    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name[:40]}.", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
        os.chmod(temporary, _mode_of_new_files())
        os.replace(temporary, target)
        temporary = None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _mode_of_new_files() -> int:
    """Return the permissions a plain `open` would have given (temporary files are private)."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _what_failed(error: Exception, verb: str) -> str:
    reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text or no path"
    return f"{verb}: {reason or type(error).__name__}"


def _read_job(model: str | ModelShape, options: JobOptions) -> Job:
    """Return the job, with where model and devices were read from as its first assumptions."""
    from brim.readers.hardware import read_cluster

    shape, origin, config = _read_shape(model, refresh=bool(options.refresh))
    cluster, hardware = read_cluster(options.gpu or "auto", num_nodes=options.num_nodes or 1)
    found = f"gpu {hardware}" if options.gpu else f"gpu auto: {hardware}"
    options, counted = _count_sequences(options)
    said = (*origin, found, *counted)
    if config.get("quantization_config"):
        from brim.readers.quantization import follow_checkpoint, keep_storage, read_quantization

        stored = read_quantization(config, name=shape.name)
        if stored is not None:
            options, filled = follow_checkpoint(options, stored, shape.name)
            job = keep_storage(build_job(shape, cluster, options), stored)
            return replace(job, assumptions=(*said, *filled, *job.assumptions))
    job = build_job(shape, cluster, options)
    return replace(job, assumptions=(*said, *job.assumptions))


def _count_sequences(options: JobOptions) -> tuple[JobOptions, tuple[str, ...]]:
    """Return the options with the rows of a dataset file counted, unless the user said how many there are."""
    if options.dataset is None:
        return options, ()
    from brim.readers.dataset import find_file, read_dataset

    name, file = options.dataset, find_file(options.dataset)
    if file is not None:  # the script that is exported may be started from another folder
        options = replace(options, dataset=os.path.abspath(file))
    if options.dataset_size is not None:
        return options, ()
    rows, sentence = read_dataset(name, packing=bool(options.packing))
    return replace(options, dataset_size=rows), (sentence,) if sentence else ()


def _read_shape(model: str | ModelShape, *, refresh: bool) -> tuple[ModelShape, tuple[str, ...], Mapping[str, Any]]:
    """Return the shape, where it was read from, and the config it was read from."""
    if isinstance(model, ModelShape):
        return model, (), {}
    if not isinstance(model, str) or not model.strip() or not model.isprintable():
        raise InvalidInput(f"model must be a hub id, a folder, a config.json or a size such as 7B, not {quoted(model)}")
    from brim.readers.sources import read_checkpoint

    shape, origin, config = read_checkpoint(model, refresh=refresh)
    return shape, (f"model {origin}",), config


def _find_answerer(name: str) -> Answerer:
    if name not in _ANSWERERS:
        raise UnknownName(kind="answerer", name=str(name), known=_ANSWERERS)
    return _ANSWERERS[name]()


def _with_default_split(options: JobOptions) -> JobOptions:
    """Return the options of `estimate`: micro-batch 1, and no accumulation unless an effective batch asks for it."""
    micro = options.micro_batch_size or 1
    asks_batch = options.effective_batch_size is not None or options.effective_batch_tokens is not None
    steps = options.gradient_accumulation_steps
    return replace(options, micro_batch_size=micro, gradient_accumulation_steps=steps or (None if asks_batch else 1))


def _stated_strategy(job: Job) -> Strategy:
    """Return the strategy that was said, with the trainer's own defaults for the rest."""
    workload = job.workload
    checkpointing = find_trainer(workload.recipe.engine.name).default_checkpointing
    knobs = {"activation_checkpointing": checkpointing} | dict(job.fixed)
    variant = list_variants(workload, knobs)[0]
    micro = knobs["micro_batch_size"]
    steps = workload.batch.sequences // (micro * workload.cluster.num_devices)
    return check_strategy(workload, variant.at(micro, steps))

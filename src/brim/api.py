"""The verbs end to end: read what is outside, let the planner choose, write it down."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from brim.errors import InvalidFile, InvalidInput, MissingExtra, UnknownName, quoted
from brim.exporters.files import write_text
from brim.planner.answerer import Answerer, answer_by_formula, answer_by_rule
from brim.planner.candidates import check_strategy, list_variants
from brim.planner.document import describe_estimate, describe_estimates, describe_plan, read_plan, schema
from brim.planner.job import Job, build_job
from brim.planner.options import JobOptions, read_options
from brim.planner.plan import plan_workload
from brim.planner.record import Plan
from brim.spec.device import Cluster
from brim.spec.model import ModelShape
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.tables.read import find_link, find_optimizer, find_task, find_trainer

if TYPE_CHECKING:
    from brim.checks.accumulation import Subject
    from brim.checks.report import AccumulationReport, NeutralityReport
    from brim.cost.ledger import Estimate
    from brim.exporters.record import Export
    from brim.probes.inputs import MakeInputs
    from brim.probes.model import BuildModel

__all__ = [
    "describe_estimate", "describe_estimates", "describe_plan", "estimate", "export", "load_plan", "plan",
    "save_plan", "schema", "trace", "verify_accumulation", "verify_neutrality",
]  # fmt: skip

_ANSWERERS = ("rule", "formula", "trace")
_MOST_LENGTHS = 256
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
    job = _read_job(model, said, known_only=said.by != "trace")
    answerer = _find_answerer(said.by or "formula", job)
    return plan_workload(job.workload, job.fixed, answerer, assumptions=job.assumptions, brim_version=__version__)


def estimate(
    model: str | ModelShape, *, by: Sequence[str] = ("formula",), fold: bool = True,
    lengths: Sequence[int] = (), timeline: str | os.PathLike[str] | None = None,
    trace_json: str | os.PathLike[str] | None = None, **options: Any,
) -> tuple[Estimate, ...]:  # fmt: skip
    """Return what one way of running costs, one estimate per answerer.

    What is not said stands as the trainer has it: micro-batch 1, no accumulation, its own checkpointing.

    Args:
        model: as for `plan`; `trace` takes any architecture of the installed transformers.
        by: answerers, `rule`, `formula` and `trace`.
        fold: whether `trace` runs alike layers four deep and repeats them; False runs every layer.
        lengths: tokens of a sequence, micro-batch by micro-batch, that `trace` runs; empty for the same in all.
        timeline: HTML file that `trace` draws memory over the step into.
        trace_json: file that `trace` writes counter tracks for Perfetto into.
        options: as for `plan`; `micro_batch_size` and `gradient_accumulation_steps` say what is costed.

    Raises:
        BrimError: input that cannot be meant, or knobs that exclude each other.
        ProbeFailed: the step cannot be traced; the text says what to pass instead.
    """
    said = read_options(options)
    if not by or isinstance(by, str):
        raise InvalidInput(f"by must be a list of answerers such as ('rule', 'formula'), not {quoted(by)}")
    for name in by:
        _check_answerer(name)
    if "trace" not in by and (timeline is not None or trace_json is not None or lengths):
        raise InvalidInput("timelines and lengths are the trace's: ask by trace")
    _check_lengths(lengths)
    job = _read_job(model, _with_default_split(said), known_only=set(by) != {"trace"})
    strategy = _stated_strategy(job)
    answers = {name: _find_answerer(name, job, fold=fold, lengths=lengths) for name in by}
    found = tuple(answers[name].estimate(job.workload, strategy) for name in by)
    if timeline is not None or trace_json is not None:
        _write_timeline(answers["trace"], job.workload, strategy, found[by.index("trace")], timeline, trace_json)
    return found


def trace(
    workload: Workload, strategy: Strategy, build_model: BuildModel | None = None,
    make_inputs: MakeInputs | None = None, *, fold: bool = True, lengths: Sequence[int] = (),
) -> Estimate:  # fmt: skip
    """Return what a strategy costs, from the real model's real step on tensors without data.

    Args:
        workload: what is trained on what, with which recipe.
        strategy: how it is run.
        build_model: returns any `nn.Module` whose forward returns an object with a `loss`; it is called with the meta
            device as default. None builds transformers' model of the workload's name.
        make_inputs: returns one micro-batch as keyword arguments of the model; None reads the model's signature.
        fold: whether alike layers are run four deep and repeated.
        lengths: tokens of a sequence, micro-batch by micro-batch; empty for the workload's length in all.

    Raises:
        MissingExtra: torch, transformers or peft is not installed.
        ProbeFailed: the step cannot be traced; the text says what to pass instead.
    """
    from brim.probes.trace import trace as trace_model

    if build_model is None:
        build_model = _builder(workload, {})(strategy)
    return trace_model(workload, strategy, build_model, make_inputs, fold=fold, lengths=lengths)


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


def verify_accumulation(
    subject: str | Callable[[], Any], *, trainer: str | None = None, ranks: int = 1, sharding: str = "ddp",
    guarded: bool = False, full_size: bool = False,
) -> AccumulationReport:  # fmt: skip
    """Return the proof that micro-batches add up to the big batch's gradient, or the named cause where they do not.

    Args:
        subject: a model as for `plan`, a saved plan, `train.py:make_trainer`, or a function that returns a trainer.
        trainer: hf, sft, dpo, plain, accelerate or lightning; the plan's, or hf, if None.
        ranks: data-parallel ranks, started with torchrun on this machine's CPU.
        sharding: ddp, or fsdp2 for a plain loop.
        guarded: verify the loop made exact by brim, not as installed.
        full_size: take a trainer's own model where it is, not a small copy on the CPU.

    Raises:
        InseparableLoss: no split over micro-batches leaves the loss as it is.
        ProbeFailed: the model cannot be built small, or the ranks died.
    """
    from brim.checks.accumulation import verify_accumulation as prove
    from brim.checks.ranks import join_ranks, run_ranks
    from brim.checks.report import AccumulationReport

    if ranks == 1:
        join_ranks()
        return prove(_read_subject(subject, trainer, sharding, guarded=guarded, full_size=full_size))
    if not isinstance(subject, str):
        raise InvalidInput("several ranks run a script each: give train.py:make_trainer instead of a function")
    words = [subject, "--sharding", sharding, *(["--trainer", trainer] if trainer else [])]
    words += [flag for flag, said in (("--guarded", guarded), ("--full-size", full_size)) if said]
    return AccumulationReport.read(run_ranks(words, ranks))


def verify_neutrality(plan: Plan | str) -> NeutralityReport:
    """Return the proof that a plan's strategy leaves the gradient as it is, or which knob belongs to the workload.

    Args:
        plan: a plan, or the file it was saved to; a small copy of its model class is run on this machine's CPU.

    Raises:
        ProbeFailed: the model cannot be built small, or does not run plainly.
    """
    from brim.checks.accumulation import WINDOW
    from brim.checks.neutrality import verify_neutrality as prove
    from brim.checks.sequences import collate, make_rows
    from brim.checks.subjects import build_model

    loaded = load_plan(plan) if isinstance(plan, str) else plan
    shape, _, config = _read_shape(loaded.workload.model.name, refresh=False, known_only=False)
    model = build_model(config, shape.architecture)
    rows = make_rows(type(model).__name__, model.config, WINDOW)
    return prove(model, rows, collate, loaded.strategy, recipe=loaded.workload.recipe)


def _read_subject(
    subject: str | Callable[[], Any], trainer: str | None, sharding: str, *, guarded: bool, full_size: bool
) -> Subject:
    """Return what is verified: the user's own trainer, or a small copy of a model under a loop by its name."""
    from brim.checks.ranks import count_ranks
    from brim.checks.script import is_plan, is_script, load_factory
    from brim.checks.subjects import build_subject
    from brim.checks.trainers import read_trainer
    from brim.runtime.forms import find_exact_form
    from brim.runtime.guard import guard
    from brim.tables.exactness import LOOP_OF_TRAINER

    if not isinstance(subject, str) or is_script(subject):
        make = load_factory(subject) if isinstance(subject, str) else subject
        return read_trainer(make, prepare=guard if guarded else None, num_ranks=count_ranks(), shrink=not full_size)
    loop = trainer
    if is_plan(subject):
        plan = load_plan(subject)
        subject, loop = plan.workload.model.name, trainer or LOOP_OF_TRAINER[plan.workload.recipe.engine.name]
    shape, _, config = _read_shape(subject, refresh=False, known_only=False)
    exactly = find_exact_form(loop or "hf") if guarded else None
    return build_subject(
        config, shape.architecture, loop or "hf", exactly=exactly, num_ranks=count_ranks(), sharding=sharding
    )


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


def _read_job(model: str | ModelShape, options: JobOptions, *, known_only: bool = True) -> Job:
    """Return the job, with where model and devices were read from as its first assumptions."""
    from brim.readers.hardware import read_cluster

    shape, origin, config = _read_shape(model, refresh=bool(options.refresh), known_only=known_only)
    cluster, hardware = read_cluster(options.gpu or "auto", num_nodes=options.num_nodes or 1)
    found = f"gpu {hardware}" if options.gpu else f"gpu auto: {hardware}"
    options, counted = _count_sequences(options)
    said = (*origin, found, *counted)
    job, filled = _build_job(shape, cluster, options, config)
    return replace(job, assumptions=(*said, *filled, *job.assumptions), config=config)


def _build_job(
    shape: ModelShape, cluster: Cluster, options: JobOptions, config: Mapping[str, Any]
) -> tuple[Job, tuple[str, ...]]:
    """Return the job, planned on the quantised weights that a checkpoint holds, and what was filled in for them."""
    if config.get("quantization_config"):
        from brim.readers.quantization import follow_checkpoint, keep_storage, read_quantization

        stored = read_quantization(config, name=shape.name)
        if stored is not None:
            options, filled = follow_checkpoint(options, stored, shape.name)
            return keep_storage(build_job(shape, cluster, options), stored), filled
    return build_job(shape, cluster, options), ()


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


def _read_shape(
    model: str | ModelShape, *, refresh: bool, known_only: bool
) -> tuple[ModelShape, tuple[str, ...], Mapping[str, Any]]:
    """Return the shape, where it was read from, and the config it was read from."""
    if isinstance(model, ModelShape):
        return model, (), {}
    if not isinstance(model, str) or not model.strip() or not model.isprintable():
        raise InvalidInput(f"model must be a hub id, a folder, a config.json or a size such as 7B, not {quoted(model)}")
    from brim.readers.headless import give_head
    from brim.readers.sources import read_checkpoint

    shape, origin, config = read_checkpoint(model, refresh=refresh, known_only=known_only)
    shape, said = give_head(shape, config)
    return shape, (f"model {origin}", *said), config


def _check_answerer(name: str) -> None:
    if name not in _ANSWERERS:
        raise UnknownName(kind="answerer", name=str(name), known=_ANSWERERS)


def _check_lengths(lengths: Sequence[int]) -> None:
    whole = isinstance(lengths, Sequence) and all(isinstance(one, int) and 1 <= one <= 2**24 for one in lengths)
    if not whole or len(lengths) > _MOST_LENGTHS:
        text = f"lengths must be at most {_MOST_LENGTHS} whole numbers such as 512,2048, not {quoted(lengths)}"
        raise InvalidInput(text)


def _find_answerer(name: str, job: Job, *, fold: bool = True, lengths: Sequence[int] = ()) -> Answerer:
    _check_answerer(name)
    if name == "rule":
        return answer_by_rule()
    if name == "formula":
        return answer_by_formula()
    try:
        from brim.probes.answer import answer_by_trace
    except ModuleNotFoundError as error:
        raise MissingExtra(package=error.name or "torch", extra="trace", purpose="--by trace") from None
    return answer_by_trace(_builder(job.workload, job.config), fold=fold, lengths=tuple(lengths))


def _builder(workload: Workload, config: Mapping[str, Any]) -> Callable[[Strategy], BuildModel]:
    """Return what builds transformers' model of a config in the attention a strategy asks for; an empty config is read
    by the model's name."""

    def build(strategy: Strategy) -> BuildModel:
        from brim.probes.model import build_from_config
        from brim.readers.sources import read_checkpoint

        shape = workload.model
        known = config or read_checkpoint(shape.name, known_only=False)[2]
        dtype = workload.recipe.weight_dtype
        return lambda: build_from_config(known, shape.architecture, strategy.attention_kernel, dtype)

    return build


def _write_timeline(
    answerer: Answerer, workload: Workload, strategy: Strategy, estimate: Estimate, page: str | os.PathLike[str] | None,
    counters: str | os.PathLike[str] | None,
) -> None:  # fmt: skip
    """Draw what the trace saw: as a page, as counter tracks, or both."""
    from brim.report.counters import counters_json
    from brim.report.timeline import timeline_page

    assert answerer.timeline is not None
    timeline = answerer.timeline(workload, strategy)
    if page is not None:
        title = f"{workload.model.name}, micro-batch {strategy.micro_batch_size}"
        write_text(page, timeline_page(timeline, estimate, title))
    if counters is not None:
        write_text(counters, counters_json(timeline))


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

"""What a job should run as, and what one way of running costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from brim.api.answerers import check_answerer, find_answerer, make_builder
from brim.api.jobs import read_job
from brim.api.measured import calibrate
from brim.api.runs import estimate_by_trial, plan_by_trial
from brim.errors import InvalidInput, quoted
from brim.files import write_text
from brim.planner.answerer import Answerer
from brim.planner.candidates import check_strategy, list_variants
from brim.planner.job import Job
from brim.planner.options import JobOptions, read_options
from brim.planner.plan import plan_workload
from brim.planner.record import Plan
from brim.spec.model import ModelShape
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.tables.read import find_trainer

if TYPE_CHECKING:
    from brim.cost.ledger import Estimate
    from brim.probes.inputs import MakeInputs
    from brim.probes.model import BuildModel

_MOST_LENGTHS = 256


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
    if said.by == "trial":
        return plan_by_trial(model, options)
    job = read_job(model, said, known_only=said.by != "trace")
    by = said.by or "formula"
    answerer, remarks = _with_history(by, find_answerer(by, job), job, said)
    assumptions = (*job.assumptions, *remarks)
    return plan_workload(job.workload, job.fixed, answerer, assumptions=assumptions, brim_version=__version__)


def estimate(
    model: str | ModelShape, *, by: Sequence[str] = ("formula",), fold: bool = True,
    lengths: Sequence[int] = (), timeline: str | os.PathLike[str] | None = None,
    trace_json: str | os.PathLike[str] | None = None, **options: Any,
) -> tuple[Estimate, ...]:  # fmt: skip
    """Return what one way of running costs, one estimate per answerer.

    What is not said stands as the trainer has it: micro-batch 1, no accumulation, its own checkpointing.

    Args:
        model: as for `plan`; `trace` takes any architecture of the installed transformers.
        by: answerers, `rule`, `formula`, `trace` and `trial`, which runs the step on the device.
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
        check_answerer(name)
    if "trace" not in by and (timeline is not None or trace_json is not None or lengths):
        raise InvalidInput("timelines and lengths are the trace's: ask by trace")
    _check_lengths(lengths)
    job = read_job(model, _with_default_split(said), known_only=set(by) != {"trace"})
    strategy = _stated_strategy(job)
    answers = {name: find_answerer(name, job, fold=fold, lengths=lengths) for name in by if name != "trial"}
    found = tuple(
        estimate_by_trial(job, said, strategy) if name == "trial"
        else _estimate_with_history(name, answers[name], job, said, strategy) for name in by
    )  # fmt: skip
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
        build_model = make_builder(workload, {})(strategy)
    return trace_model(workload, strategy, build_model, make_inputs, fold=fold, lengths=lengths)


def _with_history(by: str, answerer: Answerer, job: Job, said: JobOptions) -> tuple[Answerer, tuple[str, ...]]:
    """Return the formula as measured runs correct it, unless nobody wants that; other answerers as they are."""
    return calibrate(answerer, job.workload) if by == "formula" and said.history is not False else (answerer, ())


def _estimate_with_history(
    by: str, answerer: Answerer, job: Job, said: JobOptions, strategy: Strategy
) -> Estimate:  # fmt: skip
    answerer, remarks = _with_history(by, answerer, job, said)
    estimate = answerer.estimate(job.workload, strategy)
    return replace(estimate, notes=(*estimate.notes, *remarks)) if remarks else estimate


def _check_lengths(lengths: Sequence[int]) -> None:
    whole = isinstance(lengths, Sequence) and all(isinstance(one, int) and 1 <= one <= 2**24 for one in lengths)
    if not whole or len(lengths) > _MOST_LENGTHS:
        text = f"lengths must be at most {_MOST_LENGTHS} whole numbers such as 512,2048, not {quoted(lengths)}"
        raise InvalidInput(text)


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

#!/usr/bin/env python3
"""Real training steps on the CPU, metered by torch.profiler's memory records, beside the same steps traced.

    python benchmarks/real_steps.py                       all cases, written to benchmarks/results/real_steps.md
    python benchmarks/real_steps.py --only llama          cases whose name has the word, printed

brim's own tracker has no part in the real side: every allocation and free of the process's CPU allocator counts, asked
for by a tensor or by a kernel inside. Attention is eager, where the CPU's kernels allocate what the operators say.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile, record_function

from brim.probes.model import give_tensors, prepare_model
from brim.probes.step import plan_step, run_steps
from brim.probes.tracker import StorageTracker
from brim.readers.hf_config import read_config
from brim.spec.data import DataProfile
from brim.spec.device import Cluster
from brim.spec.recipe import Engine, Lora, Quantization, Recipe
from brim.spec.strategy import Strategy
from brim.spec.workload import BatchTarget, Workload
from brim.tables.read import find_device
from brim.trials.clock import Untracked
from tiny_models import tiny_class, tiny_config

_SETTLING_SECONDS = 0.05  # the profiler loses what happens in the instant it starts
MARK = "phase: "
DEPTH, BATCH, LENGTH = 3, 2, 128
BAR = 0.001
"""Largest difference of bytes at any moment, as a share of the real step's peak above its model."""
RESULTS = Path(__file__).parent / "results" / "real_steps.md"


class Marks(Untracked):
    """Stands where the tracker stands, and writes the phases into the profile."""

    follows = True

    def begin(self, phase: str) -> None:
        with record_function(MARK + phase):
            pass


class Case:
    """A tiny model and a way to train it."""

    def __init__(
        self, family: str, *, method: str = "full", engine: Engine | None = None, dtype: str = "fp32",
        attention: str = "eager", autocast: bool = False, depth: int = DEPTH, gpu: str = "a100-80gb",
        experts: str | None = None, quantization: Quantization | None = None, **knobs: Any,
    ) -> None:  # fmt: skip
        self.config = tiny_config(family, depth, attention="eager" if attention == "eager" else "sdpa")
        self.experts = experts
        shape = read_config(self.config.to_dict(), name=family)
        names = sorted({linear.name for group in shape.groups for linear in group.attention.linears})
        recipe = Recipe(
            method=method if quantization is None else "qlora",  # type: ignore[arg-type]
            weight_dtype=dtype, autocast=autocast, engine=engine or Engine(name="transformers"),
            quantization=quantization,
            lora=Lora(r=8, alpha=16, target_modules=tuple(names)) if method == "lora" else None,
        )  # fmt: skip
        batch = BatchTarget(sequences=2, tokens=256, low=1, high=2, min_useful=1, max_useful=2, reason="test")
        self.workload = Workload(
            model=shape, data=DataProfile(seq_len=LENGTH, packing=True), recipe=recipe, batch=batch,
            cluster=Cluster(device=find_device(gpu)), task="fine-tuning",
        )  # fmt: skip
        self.strategy = Strategy(
            **{"micro_batch_size": BATCH, "gradient_accumulation_steps": 1, "attention_kernel": attention,
               "optimizer_kernel": "foreach", **knobs}
        )  # fmt: skip

    def build(self) -> torch.nn.Module:
        """Return the model on the default device, experts computed as asked."""
        model = tiny_class(self.config)(self.config)
        if self.experts is not None:
            model.set_experts_implementation(self.experts)
        return model

    def make_inputs(self) -> Mapping[str, torch.Tensor]:
        """Return one micro-batch of full sequences; one label each where the model classifies sequences."""
        shape = (self.strategy.micro_batch_size, LENGTH)
        labels = shape[:1] if "Classification" in self.workload.model.architecture else shape
        return {"input_ids": torch.zeros(shape, dtype=torch.long), "labels": torch.zeros(labels, dtype=torch.long)}


@dataclass(slots=True)
class Span:
    """A phase of a step, and what was allocated (above 0) and freed (below 0) in it, bytes in order."""

    phase: str
    changes: list[int] = field(default_factory=list)


def measure_spans(case: Case) -> list[Span]:
    """Return the phases of a real step, from the profiler's records of the CPU allocator."""
    model = prepare_model(case.build, case.workload.recipe, case.strategy)
    give_tensors(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    step = plan_step(case.workload, case.strategy, model, case.make_inputs, Marks())  # type: ignore[arg-type]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        time.sleep(_SETTLING_SECONDS)
        run_steps(step)
    on_host = torch.get_rng_state().nbytes  # checkpointing keeps the generator's state, on the host whatever the device
    events = session.profiler.kineto_results.events()  # type: ignore[union-attr]
    wanted = [event for event in events if event.name() == "[memory]" or event.name().startswith(MARK)]
    spans = [Span("before")]
    for event in sorted(wanted, key=lambda one: one.start_ns()):
        if event.name() == "[memory]":
            if abs(event.nbytes()) != on_host:
                spans[-1].changes.append(event.nbytes())
        else:
            spans.append(Span(event.name().removeprefix(MARK)))
    return spans


def trace_spans(case: Case) -> list[Span]:
    """Return the phases of the same step on fake tensors, with the CPU's kernels and without rounding."""
    tracker = StorageTracker(_list_workspaces, scalar=1.0, kind=FakeTensor, block_bytes=1)
    model = prepare_model(case.build, case.workload.recipe, case.strategy)
    with FakeTensorMode():
        give_tensors(model)
        tracker.follow((*model.parameters(), *model.buffers()), "parameter")
        tracker.begin("before")
        with tracker:
            step = plan_step(case.workload, case.strategy, model, case.make_inputs, tracker)
            run_steps(step)
        events = list(tracker.events)  # before the model is dropped
    spans: list[Span] = []
    for event in events:
        if event.phase and not event.num_bytes:
            spans.append(Span(event.phase))
        elif event.phase:
            spans[-1].changes.append(event.num_bytes)
    return spans


def _list_workspaces(func: Any, args: tuple[Any, ...], result: Any) -> Iterator[int]:
    """Yield what a CPU kernel takes inside and gives back.

    Source: aten/src/ATen/native/Embedding.cpp embedding_dense_backward_cpu: `grad_.contiguous()`.
    """
    if func is torch.ops.aten.embedding_dense_backward.default and not args[0].is_contiguous():
        yield args[0].nbytes


def measure_phases(case: Case) -> dict[str, int]:
    """Return the most bytes of a real step above what the model takes, by phase."""
    return _highest(measure_spans(case))


def trace_phases(case: Case) -> dict[str, int]:
    """Return the same of the traced step."""
    return _highest(trace_spans(case))


def _highest(spans: Iterable[Span]) -> dict[str, int]:
    live, highest = 0, {}
    for span in spans:
        for change in (0, *span.changes):
            live += change
            highest[span.phase] = max(highest.get(span.phase, 0), live)
    return highest


@dataclass(frozen=True, slots=True)
class Comparison:
    """A traced step against the real one."""

    peak_bytes: int
    """Highest point of the real step above its model."""
    traced_peak_bytes: int
    """The same of the traced step."""
    worst_bytes: int
    """Largest difference of live bytes at any pair of aligned moments."""
    worst_phase: str
    """Phase of it."""
    num_changes: int
    """Allocations and frees of the real step larger than the bar's share of the peak."""
    num_unmatched: int
    """How many of those, real or traced, have no partner of the same size in the same order and phase."""

    @property
    def worst_share(self) -> float:
        """The largest difference as a share of the real peak."""
        return self.worst_bytes / self.peak_bytes


def compare(real: Sequence[Span], traced: Sequence[Span]) -> Comparison:
    """Return how far the traced step's live bytes are from the real one's at every moment.

    The same phases must follow one another, and each is aligned on its own: begin with begin, end with end. Between
    them the order is kept and every allocation and free of either side is aligned with a moment of the other, so that
    the largest difference is as small as it can be: the discrete Fréchet distance of the two curves. A spike or a
    dip of one side that the other lacks is therefore in the figure, however short.

    Raises:
        ValueError: the phases are not the same.
    """
    if [span.phase for span in real] != [span.phase for span in traced]:
        raise ValueError("the phases of the two steps differ")
    peak, traced_peak = (max(_highest(spans).values()) for spans in (real, traced))
    worst, phase, num_changes, num_unmatched, levels = 0, "", 0, 0, (0, 0)
    for one, other in zip(real, traced, strict=True):
        curves = [_curve(level, span.changes) for level, span in zip(levels, (one, other), strict=True)]
        distance = frechet_distance(*curves)
        if distance > worst:
            worst, phase = distance, one.phase
        big = [[change for change in span.changes if abs(change) > BAR * peak] for span in (one, other)]
        num_changes += len(big[0])
        num_unmatched += _count_unmatched(*big)
        levels = (curves[0][-1], curves[1][-1])
    return Comparison(peak, traced_peak, worst, phase, num_changes, num_unmatched)


def _curve(level: int, changes: Iterable[int]) -> list[int]:
    curve = [level]
    for change in changes:
        curve.append(curve[-1] + change)
    return curve


def _count_unmatched(real: Sequence[int], traced: Sequence[int]) -> int:
    blocks = SequenceMatcher(None, real, traced, autojunk=False).get_matching_blocks()
    return len(real) + len(traced) - 2 * sum(block.size for block in blocks)


def frechet_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the least, over alignments that keep both orders, of the largest difference of aligned values.

    Source: T. Eiter and H. Mannila, Computing Discrete Fréchet Distance, 1994.
    """
    # By diagonals: the cells of one depend on the two before it alone. Infinity stands outside of the table.
    first, second = np.array(one), np.array(other)
    outside = np.iinfo(np.int64).max
    before = last = np.full(len(one) + 1, outside)
    for diagonal in range(len(one) + len(other) - 1):
        rows = np.arange(max(0, diagonal - len(other) + 1), min(diagonal, len(one) - 1) + 1)
        reached = np.minimum(np.minimum(last[rows + 1], last[rows]), before[rows]) if diagonal else 0
        new = np.full(len(one) + 1, outside)
        new[rows + 1] = np.maximum(reached, np.abs(first[rows] - second[diagonal - rows]))
        before, last = last, new
    return int(last[-1])


PLAIN = Engine(name="plain", set_to_none=False, logits_alive_in_backward=True, reentrant_checkpointing=True)
_DENSE = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "opt", "bloom",
    "falcon_7b", "olmo2", "granite", "glm4", "bert", "t5",
)  # fmt: skip
CASES: dict[str, Callable[[], Case]] = {
    **{f"{family}, full, foreach": lambda family=family: Case(family) for family in _DENSE},
    "llama, full, loop over tensors": lambda: Case("llama", optimizer_kernel="loop"),
    "llama, full, fused": lambda: Case("llama", optimizer_kernel="fused"),
    "gpt2, full, fused, 2 micro-batches": lambda: Case(
        "gpt2", optimizer_kernel="fused", gradient_accumulation_steps=2
    ),
    "llama, full, checkpointed": lambda: Case("llama", activation_checkpointing="full"),
    "gemma2, full, checkpointed, 2 micro-batches": lambda: Case(
        "gemma2", activation_checkpointing="full", gradient_accumulation_steps=2
    ),
    "llama, full, plain loop": lambda: Case("llama", engine=PLAIN),
    "llama, full, plain loop, checkpointed (reentrant)": lambda: Case(
        "llama", engine=PLAIN, activation_checkpointing="full"
    ),
    "qwen2, LoRA": lambda: Case("qwen2", method="lora"),
    "qwen2, LoRA, checkpointed, 2 micro-batches": lambda: Case(
        "qwen2", method="lora", activation_checkpointing="full", gradient_accumulation_steps=2
    ),
    "qwen3, LoRA, loop over tensors": lambda: Case("qwen3", method="lora", optimizer_kernel="loop"),
    "phi3, LoRA, plain loop": lambda: Case("phi3", method="lora", engine=PLAIN),
}  # fmt: skip
"""Held to the bar."""
BEYOND: dict[str, Callable[[], Case]] = {
    "mixtral, full, bf16, grouped experts": lambda: Case("mixtral", dtype="bf16", experts="grouped_mm"),
    "qwen3_moe, full, bf16, grouped experts": lambda: Case("qwen3_moe", dtype="bf16", experts="grouped_mm"),
    "llama, full, bf16": lambda: Case("llama", dtype="bf16"),
    "llama, LoRA, bf16": lambda: Case("llama", method="lora", dtype="bf16"),
    "llama, full, bf16 autocast": lambda: Case("llama", autocast=True),
    "llama, LoRA, bf16 autocast, checkpointed": lambda: Case(
        "llama", method="lora", autocast=True, activation_checkpointing="full"
    ),
}  # fmt: skip
"""The CPU's bf16 matrix products take scratch memory inside: shown, not held to the bar."""


def run_case(name: str) -> Comparison:
    """Return the comparison of one case of `CASES` or `BEYOND`."""
    case = (CASES | BEYOND)[name]()
    return compare(measure_spans(case), trace_spans(case))


def format_row(name: str, found: Comparison) -> str:
    """Return one line of the table."""
    return (
        f"| {name} | {found.peak_bytes:,} | {found.traced_peak_bytes:,} | {found.worst_bytes:,} | "
        f"{100 * found.worst_share:.3f} % | {found.worst_phase or '-'} | {found.num_changes:,} | "
        f"{found.num_unmatched} |"
    )


HEAD = """# Traced steps against real ones

{machine}

Two optimizer steps and an evaluation of tiny random models ({depth} layers, {batch} x {length} tokens, eager
attention), run for real on the CPU under `torch.profiler` (`profile_memory=True`) and traced on fake tensors with the
CPU's kernels and no rounding. Bytes are those above the model's own. *Largest difference*: of live bytes at any
moment, each phase aligned with its like, begin with begin and end with end, the order of allocations kept on both sides
(discrete Fréchet distance). *Changes*: allocations and frees larger than {bar} of the peak in the real step.
*Unmatched*: those of either side without a partner of the same size, in the same order and phase. Smaller ones count
in the difference and not in the last two columns: the profiler sees 2 KiB that `cumsum` casts its input to and a few
that the CPU's layer norm takes inside. Left out of the real side is the state of the random generator, which
checkpointing keeps on the host whatever the device (5,056 bytes each). Rows in bf16 are shown and not held to the bar
of {bar}: the CPU's bf16 `mm` takes scratch memory inside (seen in llama, full).

| model, method | real peak, bytes | traced | largest difference, bytes | of the peak | in | changes | unmatched |
|---|---:|---:|---:|---:|---|---:|---:|
"""


def describe_machine() -> str:
    """Return versions and machine in one line."""
    import peft
    import transformers

    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, Python "
        f"{platform.python_version()}, {platform.system()} {platform.machine()}, CPU, {torch.get_num_threads()} threads"
    )


def main() -> int:
    """Run the command line; the exit status is 1 where a case misses the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this word; printed, not written")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines, missed = [], 0
    for name in (name for name in CASES | BEYOND if options.only in name):
        found = run_case(name)
        missed += name in CASES and found.worst_share > BAR
        lines.append(format_row(name, found))
        print(lines[-1], flush=True)
    if not options.only:
        head = HEAD.format(
            machine=describe_machine(), depth=DEPTH, batch=BATCH, length=LENGTH, bar=f"{100 * BAR:g} %"
        )  # fmt: skip
        RESULTS.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

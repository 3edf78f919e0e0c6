#!/usr/bin/env python3
"""How fast brim answers: strategies costed per second, one plan in the process, and `brim plan` as a whole process.

    python benchmarks/speed.py --out benchmarks/results/speed.md

The process runs from compiled bytecode, as an installed package does, in turn with a bare interpreter.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import brim
from brim.api import plan
from brim.cost.blocks import cost_head, cost_layer
from brim.cost.estimate import peak_bytes
from brim.cost.steptime import seconds
from brim.planner.answerer import answer_by_formula
from brim.planner.search import search
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload

JOB = ("meta-llama/Llama-3.1-8B", "--method", "qlora", "--gpu", "rtx-4090")
RUNS = 11
BATCH = 55_440  # sequences: 120 ways to split it
BAR_SECONDS, BAR_PER_SECOND = 0.6, 10_000
os.environ["BRIM_HISTORY"] = "off"  # how many runs of one's own there are decides no time here


class Whole(NamedTuple):
    """Wall times of processes run in turn, seconds."""

    brim: list[float]
    bare: list[float]

    @property
    def ratio(self) -> float:
        """Return how many bare interpreters one `brim plan` takes."""
        return statistics.median(one / other for one, other in zip(self.brim, self.bare, strict=True))


def time_processes(runs: int) -> Whole:
    """Return wall times of `brim plan` and of a bare interpreter, after one run that compiles."""
    with tempfile.TemporaryDirectory() as folder:
        said = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        said["PYTHONPYCACHEPREFIX"] = folder

        def timed(*command: str) -> float:
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env=said)
            return time.perf_counter() - start

        timed("-m", "brim", "plan", *JOB)
        pairs = [(timed("-m", "brim", "plan", *JOB), timed("-c", "pass")) for _ in range(runs)]
    return Whole([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def list_strategies() -> list[Strategy]:
    """Return every split of 512 sequences with every checkpointing and two optimizer kernels."""
    return [
        Strategy(
            micro_batch_size=2**power, gradient_accumulation_steps=512 // 2**power, activation_checkpointing=mode,
            optimizer_kernel=kernel, loss_kernel="chunked",
        )
        for power in range(10)
        for mode in ("none", "selective", "full")
        for kernel in ("fused", "foreach")
    ]  # fmt: skip


def costed_per_second(cost: Callable[[Strategy], object]) -> float:
    """Return strategies costed per second over the enumeration, 20 times."""
    strategies, rounds, start = list_strategies(), 20, time.perf_counter()
    for _ in range(rounds):
        for strategy in strategies:
            cost(strategy)
    return rounds * len(strategies) / (time.perf_counter() - start)


def time_search(workload: Workload, *, forgets: bool) -> tuple[int, float]:
    """Return the strategies the planner's search costs for a new workload, and its wall time, seconds.

    Args:
        workload: the job; its batch is replaced by one that splits in many ways.
        forgets: whether the tapes of layers and head are recorded anew.
    """
    fresh = replace(workload, batch=replace(workload.batch, sequences=BATCH))
    if forgets:
        cost_layer.cache_clear()
        cost_head.cache_clear()
    answerer, start = answer_by_formula(), time.perf_counter()
    found = search(fresh, {}, answerer, 2**50)
    return found.num_costed, time.perf_counter() - start


def median_seconds(ask: Callable[[], object], runs: int) -> float:
    """Return the median wall time of a question asked again and again, seconds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        ask()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(runs: int) -> str:
    """Return the figures as a Markdown table."""

    def ask() -> Workload:
        return plan(JOB[0], method="lora", gpu="h100").workload

    known, cold = ask(), ask()  # equal, but profiles are known by identity: the second has none
    both = costed_per_second(lambda strategy: (peak_bytes(cold, strategy), seconds(cold, strategy)))
    memory = costed_per_second(lambda strategy: peak_bytes(known, strategy))
    (number, cold_search), (_, search_seconds) = time_search(known, forgets=True), time_search(known, forgets=False)
    one_plan, whole = median_seconds(ask, runs), time_processes(runs)
    versions = f"brim {brim.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    command = "brim plan " + " ".join(JOB)
    return f"""# Speed

Generated by `python benchmarks/speed.py`; {versions}, {os.cpu_count()} cores.
Medians of {runs} runs, in turn with a bare interpreter; on a shared machine trust the ratio first.

| what | measured | bar |
|---|---|---|
| `{command}`, whole process | {statistics.median(whole.brim):.2f} s (min {min(whole.brim):.2f}) | {BAR_SECONDS} s |
| the same over `python -c pass` | {whole.ratio:.1f} x | - |
| `brim.plan(...)` in a running process | {1000 * one_plan:.0f} ms | - |
| planner's search, {number} strategies, memory and time, tapes recorded first | {1000 * cold_search:.0f} ms | - |
| the same for another workload of the model | {number / search_seconds:,.0f} /s | {BAR_PER_SECOND:,} /s |
| strategies costed, memory and time, profiles built on the way | {both:,.0f} /s | {BAR_PER_SECOND:,} /s |
| strategies costed, memory, profiles known | {memory:,.0f} /s | {BAR_PER_SECOND:,} /s |
"""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=RUNS)
    options = parser.parse_args()
    text = measure(options.runs)
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

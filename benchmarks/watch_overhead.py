"""What watching costs: processor seconds of a guarded optimizer step with and without it, alternating in one process.

    python benchmarks/watch_overhead.py --out benchmarks/results/watch_overhead.md

The model and the loop of `guard_overhead.py`, with a plan. Watching looks at steps 2, 3, 5, 10, 20, 30, 40 and each
50th, so the first ten steps, in which it looks four times and again at the end, are its dearest; each step logs. The
meter is that of a capped CPU whose counting is paid in both runs. What the ratio of two runs cannot show below their
own noise is summed directly: the processor time inside the watcher's methods, over that of the steps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import brim
from brim.devices.capped import CappedMemory
from brim.planner.record import Plan
from brim.runtime.observe import Watcher
from brim.units import GIB
from guard_overhead import ACCUMULATION, CONFIG, LENGTH, SIZE, Clock

STEPS, ROUNDS = 11, 6
ENTRIES = ("begin_step", "add", "end_step", "look", "set_aside", "pause", "read_log", "find", "finish", "__init__")
"""The watcher's methods that a trainer's callback calls."""


class Stopwatch:
    """Processor seconds inside the watcher, by method; an inner call counts with the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(ENTRIES, 0.0)
        self._depth = 0

    def __enter__(self) -> Stopwatch:
        self._kept = {name: getattr(Watcher, name) for name in ENTRIES}
        for name, method in self._kept.items():
            setattr(Watcher, name, self._time(name, method))
        return self

    def __exit__(self, *_: object) -> None:
        for name, method in self._kept.items():
            setattr(Watcher, name, method)

    def _time(self, name: str, method: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return method(*args, **kwargs)
            self._depth, begin = 1, time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self._depth, self.seconds[name] = 0, self.seconds[name] + time.process_time() - begin

        return timed


def make_plan() -> Plan:
    """Return the plan of the run."""
    config = CONFIG.to_dict() | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
        return brim.plan(
            folder, gpu="4GiB", micro_batch_size=SIZE, effective_batch_size=SIZE * ACCUMULATION, seq_len=LENGTH,
            method="full", trainer="transformers", dtype="fp32", activation_checkpointing="none", history=False,
        )  # fmt: skip



def run(plan: Plan, *, watched: bool, folder: str, steps: int = STEPS) -> float:
    """Return the processor seconds of all steps but the first, over their number; logs and records are in it."""
    torch.manual_seed(0)
    tokens = torch.randint(0, CONFIG.vocab_size, (steps * SIZE * ACCUMULATION, LENGTH))
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    clock = Clock()
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=SIZE, gradient_accumulation_steps=ACCUMULATION, max_steps=steps,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    with CappedMemory(4 * GIB), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer = Trainer(LlamaForCausalLM(CONFIG), arguments, train_dataset=rows)
        brim.guard(trainer, plan, watch=watched, history=False).add_callback(clock)
        trainer.train()
        end = time.process_time()
    marks = [*clock.times[:-1], end]
    return sum(after - before for before, after in pairwise(marks)) / (len(marks) - 1)


def measure(plan: Plan) -> tuple[list[float], list[float], Stopwatch]:
    """Return the ratio of each pair of neighbouring runs, the step without watching, and the watcher's own time."""
    ratios, steps = [], []
    with tempfile.TemporaryDirectory() as folder:
        run(plan, watched=True, folder=folder)  # warm up
        for turn in range(ROUNDS):
            order = (True, False) if turn % 2 else (False, True)
            found = {watched: run(plan, watched=watched, folder=folder) for watched in order}
            ratios.append(found[True] / found[False])
            steps.append(found[False])
        with Stopwatch() as stopwatch:
            run(plan, watched=True, folder=folder)
    return ratios, steps, stopwatch


def main() -> None:
    """Print the overhead, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    ratios, steps, stopwatch = measure(make_plan())
    own = stopwatch.seconds
    noise = ", whose noise is larger than the effect" if min(ratios) < 1 < max(ratios) else ""
    begins, ends = own["__init__"], own["finish"]
    running = sum(own.values()) - begins - ends
    lines = [
        "# What watching costs", "",
        "Generated by `python benchmarks/watch_overhead.py --out benchmarks/results/watch_overhead.md`.",
        f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}, "
        f"{platform.machine()}, {os.cpu_count()} cores, one thread, processor time; load of the machine "
        f"{os.getloadavg()[1]:.0f}.", "",
        f"Model of {sum(p.numel() for p in LlamaForCausalLM(CONFIG).parameters()):,} parameters, micro-batch {SIZE} x "
        f"accumulation {ACCUMULATION} x {LENGTH} tokens; {ROUNDS} pairs of runs of {STEPS} steps, the first left out; "
        "each step logs.", "",
        f"- a step, guarded and not watched: {1000 * median(steps):.1f} ms",
        f"- watched over not watched: median {median(ratios):.4f} (pairs from {min(ratios):.4f} to {max(ratios):.4f}"
        f"{noise})",
        f"- inside the watcher: {1000 * running / STEPS:.2f} ms a step of the first {STEPS}, "
        f"{running / STEPS / median(steps):.2%} of it (four looks and {STEPS} logs among them)",
        f"- once, when training begins and ends: {1000 * begins:.1f} and {1000 * ends:.1f} ms (record and versions; "
        "without the history)",
    ]  # fmt: skip
    print("\n".join(lines))
    if out is not None:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

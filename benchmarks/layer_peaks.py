#!/usr/bin/env python3
"""Compare the highest point of brim's formula with that of a real forward and backward pass, on CPU.

    python benchmarks/layer_peaks.py [FAMILY ...] [--out FILE.md]

Storages made by the step are counted while they live (`live_storages`): activations, temporaries and gradients,
once over the whole step and once from the moment the gradient reaches the last layer.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers

from brim.cost.estimate import profile_strategy
from brim.spec.strategy import Strategy
from live_storages import CudaAutocast, LiveStorages, cuda_kernels
from saved_tensors import CASES, EAGER_ONLY, Case, build_case, read_tiny, tiny_setting
from tiny_models import BATCH, LENGTH, tiny_inputs

DEPTH = 4
USUAL = ("full-bf16", "full-fp32-autocast", "lora-attention-bf16", "lora-attention-autocast")
FAMILIES = ("llama", "gemma2", "gpt2", "mixtral", "qwen3", "phi", "phi3", "olmo2", "gpt_oss")


class Peak(NamedTuple):
    """Highest bytes of the step, and of the part of it that goes back through the layers."""

    step_bytes: int
    layers_bytes: int


def measure_peak(family: str, case: Case, attention: str) -> Peak:
    """Return the highest points of a real step."""
    model, config = build_case(family, case, attention, DEPTH)
    inputs = dict(tiny_inputs(config))
    live = LiveStorages([*model.parameters(), *model.buffers(), *inputs.values()])
    before: list[int] = []
    layers = next(part for _, part in model.named_modules() if isinstance(part, torch.nn.ModuleList))

    def reached(_: torch.Tensor) -> None:
        before.append(live.peak_bytes)
        live.peak_bytes = live.live_bytes

    def attach(_module: object, _args: object, output: object) -> None:
        state = output[0] if isinstance(output, tuple) else output
        state.register_hook(reached)  # type: ignore[attr-defined]

    layers[-1].register_forward_hook(attach)
    with cuda_kernels(), live:
        with contextlib.ExitStack() as stack:
            for context in (torch.autocast("cpu", torch.bfloat16), CudaAutocast()) if case.autocast else ():
                stack.enter_context(context)
            loss = model(**inputs).loss
        loss.backward()
    return Peak(max(*before, live.peak_bytes), live.peak_bytes)


def predict_peak(family: str, case: Case, attention: str) -> Peak:
    """Return the formula's highest points: gradients, activations and temporaries, without optimizer states."""
    _, config = build_case(family, case, attention, DEPTH)
    _, workload = tiny_setting(read_tiny(config), case, attention)
    strategy = Strategy(micro_batch_size=BATCH, gradient_accumulation_steps=1, attention_kernel=attention)  # type: ignore[arg-type]
    tokens, found = BATCH * LENGTH, {}
    for row in profile_strategy(workload, strategy).rows:
        total = (row.gradients + row.activations + row.temporaries).at(tokens)
        found[row.name] = max(found.get(row.name, 0), total)
    ran = {name: total for name, total in found.items() if "loss" in name or "ward" in name}
    return Peak(max(ran.values()), max(total for name, total in ran.items() if name.startswith("backward")))


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    lines = [
        "| family | case | attention | step: formula KiB | real | ratio | layers backward: formula | real | ratio |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    for family in options.families or FAMILIES:
        for name in options.case or USUAL:
            attention = "eager" if family in EAGER_ONLY else "sdpa"
            told, real = (ask(family, CASES[name], attention) for ask in (predict_peak, measure_peak))
            cells = (told[0] // 1024, real[0] // 1024, told[0] / real[0], told[1] // 1024, real[1] // 1024)
            row = "| {} | {} | {} | {:,} | {:,} | {:.3f} | {:,} | {:,} | {:.3f} |"
            lines.append(row.format(family, name, attention, *cells, told[1] / real[1]))
            print(lines[-1], flush=True)
    if options.out:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}, CPU"
        options.out.write_text(f"# Peaks of a step\n\n{versions}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Compare brim's tapes with what autograd keeps in real transformers models, on CPU.

    python benchmarks/saved_tensors.py [FAMILY ...] [--case CASE] [--attention sdpa|eager] [--verbose] [--out FILE.md]

Tiny random models of every family are run forward at two depths; the storages alive afterwards, differenced, are what
one layer keeps. The attention kernel and autocast's list of fp32 operators are those of CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import peft
import torch
import transformers

from brim.cost.blocks import Block, cost_head, cost_layer
from brim.cost.layers import record_layer
from brim.cost.setting import Setting, read_setting
from brim.readers.hf_config import read_config
from brim.spec.data import DataProfile
from brim.spec.device import Cluster
from brim.spec.model import ModelShape
from brim.spec.recipe import Engine, Lora, Recipe
from brim.spec.strategy import Strategy
from brim.spec.workload import BatchTarget, Workload
from brim.tables.read import find_device
from live_storages import CudaAutocast, LiveStorages, cuda_kernels
from tiny_models import BATCH, FAMILIES, LENGTH, build_tiny, tiny_config, tiny_inputs

DEPTHS = (2, 4)
RANK = 8
EAGER_ONLY = ("bloom", "gemma2", "gpt_oss")


@dataclass(frozen=True, slots=True)
class Case:
    """A method and a precision."""

    name: str
    method: str
    weights: str = "bf16"
    autocast: bool = False
    targets: str = ""
    dropout: float = 0.0


CASES = {
    case.name: case
    for case in (
        Case("full-bf16", "full"),
        Case("full-fp32-autocast", "full", "fp32", True),
        Case("lora-attention-bf16", "lora", targets="attention"),
        Case("lora-attention-autocast", "lora", autocast=True, targets="attention"),
        Case("lora-all-bf16", "lora", targets="all-linear"),
        Case("lora-all-autocast", "lora", autocast=True, targets="all-linear"),
        Case("lora-all-dropout-bf16", "lora", targets="all-linear", dropout=0.05),
        Case("lora-all-dropout-autocast", "lora", autocast=True, targets="all-linear", dropout=0.05),
        Case("lora-all-fp32-autocast", "lora", "fp32", True, "all-linear"),
    )
}


class Kept(NamedTuple):
    """Bytes kept from forward to backward in a model of a depth, and which storages they are."""

    total_bytes: int
    storages: Counter[tuple[str, str, int]]


class Comparison(NamedTuple):
    """What one more layer (one in each stack) keeps, and what is kept outside layers, bytes."""

    tape_bytes: int
    real_bytes: int
    tape_head_bytes: int
    real_rest_bytes: int
    storages: Counter[tuple[str, str, int]]

    @property
    def ratio(self) -> float:
        """Tape over reality, for a layer."""
        return self.tape_bytes / self.real_bytes


def read_tiny(config: transformers.PretrainedConfig) -> ModelShape:
    """Return brim's shape of a tiny model."""
    return read_config(config.to_dict(), name=config.model_type)


def _targets(shape: ModelShape, case: Case) -> tuple[str, ...]:
    if case.targets != "attention":
        return (case.targets,)
    return tuple(sorted({linear.name for group in shape.groups for linear in group.attention.linears}))


def tiny_setting(shape: ModelShape, case: Case, attention: str) -> tuple[Setting, Workload]:
    """Return brim's setting of a case, and its workload."""
    lora = Lora(r=RANK, alpha=16, dropout=case.dropout, target_modules=_targets(shape, case), dtype="fp32")
    recipe = Recipe(
        method=case.method, weight_dtype=case.weights, autocast=case.autocast,  # type: ignore[arg-type]
        lora=lora if case.method == "lora" else None, engine=Engine(name="transformers"),
    )  # fmt: skip
    batch = BatchTarget(sequences=2, tokens=2 * LENGTH, low=1, high=2, min_useful=1, max_useful=2, reason="test")
    workload = Workload(
        model=shape, data=DataProfile(seq_len=LENGTH, packing=True), recipe=recipe, batch=batch,
        cluster=Cluster(device=find_device("a100-80gb")), task="fine-tuning",
    )  # fmt: skip
    strategy = Strategy(
        micro_batch_size=BATCH, gradient_accumulation_steps=1, attention_kernel=attention  # type: ignore[arg-type]
    )
    return read_setting(workload, strategy), workload


def build_case(family: str, case: Case, attention: str, depth: int) -> tuple[torch.nn.Module, Any]:
    """Return the real model of a case, and its config."""
    config = tiny_config(family, depth, attention=attention)
    model: torch.nn.Module = build_tiny(config, torch.bfloat16 if case.weights == "bf16" else torch.float32)
    if case.method == "lora":
        targets = _targets(read_tiny(config), case)
        lora = peft.LoraConfig(
            r=RANK, lora_alpha=16, lora_dropout=case.dropout,
            target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        )  # fmt: skip
        model = peft.get_peft_model(model, lora)  # type: ignore[arg-type]
    return model.train(), config


def measure_kept(family: str, case: Case, attention: str, depth: int) -> Kept:
    """Return what a real model keeps after its forward pass."""
    model, config = build_case(family, case, attention, depth)
    inputs = dict(tiny_inputs(config))
    if "pixel_values" in inputs and case.weights == "bf16":
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    ignored = [*model.parameters(), *model.buffers(), *inputs.values()]
    live = LiveStorages(ignored)
    autocast = (torch.autocast("cpu", torch.bfloat16), CudaAutocast()) if case.autocast else ()
    with cuda_kernels(), live, contextlib.ExitStack() as stack:
        for context in autocast:
            stack.enter_context(context)
        loss = model(**inputs).loss
    kept = Kept(live.live_bytes, live.inventory())
    del loss
    return kept


def tape_blocks(
    family: str, case: Case, attention: str, depth: int
) -> tuple[ModelShape, Setting, list[tuple[int, Block]], Block]:
    """Return brim's blocks of a tiny model: layers with their counts, and the head."""
    shape = read_tiny(tiny_config(family, depth, attention=attention))
    setting, workload = tiny_setting(shape, case, attention)
    layers = [(group.count, cost_layer(group, setting, "none")) for group in shape.groups]
    return shape, setting, layers, cost_head(shape, setting, workload.recipe.engine, "dense")


def compare(family: str, case: Case, attention: str) -> Comparison:
    """Return tape and reality of one family and case."""
    shallow, deep = (measure_kept(family, case, attention, depth) for depth in DEPTHS)
    steps = DEPTHS[1] - DEPTHS[0]
    real = (deep.total_bytes - shallow.total_bytes) / steps
    shape, _, layers, head = tape_blocks(family, case, attention, steps)
    tokens = BATCH * (shape.sequence_tokens or LENGTH)
    tape = sum(count * block.kept.at(tokens) for count, block in layers) / steps
    difference = Counter(deep.storages)
    difference.subtract(shallow.storages)
    return Comparison(
        round(tape), round(real), head.kept.at(tokens), round(shallow.total_bytes - DEPTHS[0] * real), +difference
    )


def describe(family: str, case: Case, attention: str, found: Comparison) -> str:
    """Return what reality and tape keep in a layer, storage by storage."""
    shape, setting, _, _ = tape_blocks(family, case, attention, DEPTHS[1] - DEPTHS[0])
    tokens, steps = BATCH * (shape.sequence_tokens or LENGTH), DEPTHS[1] - DEPTHS[0]
    lines = ["  real:"]
    for (maker, what, size), count in sorted(found.storages.items(), key=lambda item: -item[0][2] * item[1]):
        lines.append(f"    {count / steps:5.1f} x {size / tokens:8.1f} B/token  {maker:36} {what}")
    for group in shape.groups:
        tape, _ = record_layer(group, setting)
        lines.append(f"  tape ({group.count} x {group.stack}):")
        saved = {id(tensor): tensor for op in tape.ops if op.output.needs_grad for tensor in op.saves}
        for tensor in sorted(saved.values(), key=lambda one: -one.size.at(tokens)):
            lines.append(f"            {tensor.size.at(tokens) / tokens:8.1f} B/token  {tensor.name}")
    return "\n".join(lines)


def write_row(family: str, case: Case, attention: str, found: Comparison) -> str:
    """Return a row of the table, bytes per token."""
    shape = read_tiny(tiny_config(family, DEPTHS[0]))
    tokens = BATCH * (shape.sequence_tokens or LENGTH)
    numbers = [size / tokens for size in (found.tape_bytes, found.real_bytes)]
    outside = [size / tokens for size in (found.tape_head_bytes, found.real_rest_bytes)]
    return (
        f"| {family} | {case.name} | {attention} | {numbers[0]:,.1f} | {numbers[1]:,.1f} | {found.ratio:.3f} "
        f"| {outside[0]:,.1f} | {outside[1]:,.1f} |"
    )


def runs(family: str, case: Case, attention: str) -> bool:
    """Whether transformers and PEFT have the case: PEFT has no dropout for adapters of fused experts."""
    groups = read_tiny(tiny_config(family, DEPTHS[0])).groups
    reached = any(getattr(group.mlp, "adapters_reach_experts", False) for group in groups)
    return (attention == "eager" or family not in EAGER_ONLY) and not (
        reached and case.dropout and case.targets == "all-linear"
    )


HEADER = (
    "| family | case | attention | tape B/token/layer | real | ratio | outside layers: tape | real |",
    "|---|---|---|---:|---:|---:|---:|---:|",
)


def compare_all(options: argparse.Namespace) -> list[str]:
    """Print and return the table."""
    lines = list(HEADER)
    print("\n".join(lines))
    for family in options.families or FAMILIES:
        for name in options.case or CASES:
            for attention in options.attention or ("sdpa", "eager"):
                if not runs(family, CASES[name], attention):
                    continue
                found = compare(family, CASES[name], attention)
                lines.append(write_row(family, CASES[name], attention, found))
                print(lines[-1], flush=True)
                if options.verbose and abs(found.ratio - 1) > 0.005:
                    print(describe(family, CASES[name], attention, found), flush=True)
    return lines


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--attention", action="append", choices=("sdpa", "eager"))
    parser.add_argument("--verbose", action="store_true", help="list the storages of every mismatch")
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    lines = compare_all(options)
    if options.out:
        head = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, Python "
        head += f"{platform.python_version()}, {platform.system()} {platform.machine()}, CPU"
        options.out.write_text(f"# Saved tensors\n\n{head}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

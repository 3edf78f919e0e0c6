#!/usr/bin/env python3
"""What the rule of thumb says and what the formula says, for the rule's own jobs; writes docs/rule-of-thumb.md.

    python benchmarks/rule_of_thumb.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import brim
from brim.cost.ledger import Estimate
from brim.tables.read import find_device

GIB = 2**30
WIDTH = 120
PAGE = Path(__file__).parent.parent / "docs/rule-of-thumb.md"
LLAMA_8B, MIXTRAL = "meta-llama/Llama-3.1-8B", "mistralai/Mixtral-8x7B-v0.1"
MODELS = {7: "meta-llama/Llama-2-7b-hf", 13: "meta-llama/Llama-2-13b-hf", 70: "meta-llama/Llama-2-70b-hf"}
# A card of each size in the rule's matrix for 4-bit models, billions of parameters, batches per device.
MATRIX = (
    ("8 GB", "rtx-3070", 7, (1, 2)), ("16 GB", "rtx-4080", 7, (4, 8)), ("24 GB", "rtx-4090", 7, (8, 16)),
    ("24 GB", "rtx-4090", 13, (2, 4)), ("40 GB", "a100-sxm4-40gb", 70, (1, 2)), ("80 GB", "a100-80gb", 70, (1, 2)),
)  # fmt: skip
LENGTHS = (512, 2048, 4096)
Options = dict[str, Any]
FULL_CHECKPOINTING: Options = {"activation_checkpointing": "full"}
TRAINER: Options = {"trainer": "transformers", "method": "lora", "micro_batch_size": 4, "seq_len": 2048}
TRL_QLORA: Options = TRAINER | FULL_CHECKPOINTING | {"method": "qlora", "trainer": "trl"}


class Omission(NamedTuple):
    """Something the rule leaves out: two jobs that differ in nothing else, and what to say."""

    title: str
    low: Options
    high: Options
    text: str
    model: str = LLAMA_8B


OMISSIONS = (
    Omission(
        "The length of the sequences", TRAINER | FULL_CHECKPOINTING | {"method": "qlora", "seq_len": 512},
        TRAINER | FULL_CHECKPOINTING | {"method": "qlora", "seq_len": 4096},
        "The table names no length, and activations and logits grow with it. QLoRA, micro-batch 4: {low} at 512 "
        "tokens, {high} at 4,096.",
    ),
    Omission(
        "The logits", TRAINER | FULL_CHECKPOINTING | {"trainer": "trl"}, TRAINER | FULL_CHECKPOINTING,
        "A vocabulary of 128,256 makes 250 KiB of 16-bit logits a token; a dense loss holds them beside an fp32 copy, "
        "the log-softmax, and two gradients of that shape. LoRA, 8,192 tokens a micro-batch: {low} with TRL's chunked "
        "loss, {high} with the HF Trainer's dense one. The rule has 2 GB for everything of the kind.",
    ),
    Omission(
        "Gradients and optimizer states", TRAINER | FULL_CHECKPOINTING,
        TRAINER | FULL_CHECKPOINTING | {"method": "full"},
        "Base memory of 2 GB per billion parameters is the weights alone. Trained in bf16 they bring a gradient and "
        "two moments of their own size: {low} with LoRA, {high} with full training of the same 8B model.",
    ),
    Omission(
        "The dtype of what is trained", TRAINER | FULL_CHECKPOINTING | {"method": "full", "micro_batch_size": 1},
        TRAINER | FULL_CHECKPOINTING | {"method": "full", "micro_batch_size": 1, "dtype": "fp32"},
        "Weights, gradients and moments double with the dtype they are loaded in: {low} in bf16, {high} in fp32, which "
        "is what some loaders do unless told otherwise.",
    ),
    Omission(
        "The optimizer's own copies", TRAINER | FULL_CHECKPOINTING | {"method": "full", "micro_batch_size": 1},
        TRAINER | FULL_CHECKPOINTING | {"method": "full", "micro_batch_size": 1, "optimizer_kernel": "foreach"},
        "torch's foreach kernels, the default outside the HF Trainer, hold a copy of every second moment while they "
        "step: {low} with the fused kernel, {high} with foreach. In full training this alone sets the peak.",
    ),
    Omission(
        "Accumulation", TRAINER | {"method": "full", "micro_batch_size": 2},
        TRAINER | {"method": "full", "micro_batch_size": 2, "gradient_accumulation_steps": 4},
        "The rule raises accumulation as if it were free. From the second micro-batch on the gradients lie beside the "
        "activations: {low} with one micro-batch a step, {high} with four, whatever their number.",
    ),
    Omission(
        "Checkpointing", TRAINER | {"trainer": "trl", "activation_checkpointing": "full"},
        TRAINER | {"trainer": "trl", "activation_checkpointing": "none"},
        "It \"saves 40-60 % of activations\", one is told. A layer keeps some 25 tensors of its width or more, a "
        "checkpointed one its input: {high} without, {low} with it. Nearly all of them are saved, until the logits or "
        "the layer that is recomputed set the peak.",
    ),
    Omission(
        "The attention kernel", TRAINER | {"micro_batch_size": 1},
        TRAINER | {"micro_batch_size": 1, "attention_kernel": "eager"},
        "Scores are stored by eager attention only: 6 bytes a head and pair of tokens in each layer. One sequence of "
        "2,048 tokens without checkpointing: {low} with SDPA, {high} with eager; twice the length makes the difference "
        "four times as large.",
    ),
    Omission(
        "The trainer", TRL_QLORA, TRAINER | FULL_CHECKPOINTING | {"method": "qlora"},
        "The same QLoRA job takes {low} in TRL and {high} in the HF Trainer with PEFT's "
        "`prepare_model_for_kbit_training`: a dense loss, and every 16-bit weight, norm and residual cast to fp32.",
    ),
    Omission(
        "What stays in 16 bit", TRL_QLORA, TRL_QLORA,
        "Half a GB per billion parameters is right for the matrices of the layers. Embeddings and head stay in 16 bit, "
        "and since transformers 5 so do fused experts, which bitsandbytes does not see: the weights of Llama-3.1-8B in "
        "nf4 take {weights_8b} where the rule says {said_8b}, those of Mixtral 8x7B {weights} where it says {said}.",
        MIXTRAL,
    ),
    Omission(
        "Fragments and the context", TRAINER | FULL_CHECKPOINTING, TRAINER | FULL_CHECKPOINTING,
        "The allocator holds more than it hands out, and the process more than the allocator: {low} allocated, "
        "{reserved} reserved, {device} on the device for LoRA with dense logits.",
    ),
)  # fmt: skip


def ask(model: str, gpu: str, by: str = "formula", **options: Any) -> Estimate:
    """Return one answerer's estimate; accumulation 1 unless said."""
    return brim.estimate(model, gpu=gpu, by=(by,), history=False, **({"gradient_accumulation_steps": 1} | options))[0]


def gib(size_bytes: float) -> str:
    """Return bytes as GiB with one digit."""
    return f"{size_bytes / GIB:.1f} GiB"


def list_matrix() -> Iterator[str]:
    """Yield a line for each batch of the rule's matrix: its own answer, and the formula's at three lengths."""
    for size, gpu, billions, batches in MATRIX:
        for batch in batches:
            job = {"method": "qlora", "trainer": "transformers", "micro_batch_size": batch} | FULL_CHECKPOINTING
            rule = ask(MODELS[billions], gpu, "rule", **job).peak_allocated_bytes
            cells = [_cell(gpu, ask(MODELS[billions], gpu, seq_len=length, **job)) for length in LENGTHS]
            yield f"| {size}, {billions}B, batch {batch} | {rule / GIB:.1f} | " + " | ".join(cells) + " |"


def _cell(gpu: str, found: Estimate) -> str:
    fits = found.device_bytes <= find_device(gpu).capacity_bytes
    return f"{found.peak_allocated_bytes / GIB:.1f}" + ("" if fits else " **no**")


def list_omissions() -> Iterator[str]:
    """Yield a heading and a paragraph for each thing that is left out, with its size."""
    weights_8b, said_8b = (_weights(ask(LLAMA_8B, "b200", by, **TRL_QLORA)) for by in ("formula", "rule"))
    for omission in OMISSIONS:
        low, high = (ask(omission.model, "b200", **options) for options in (omission.low, omission.high))
        said = _weights(ask(omission.model, "b200", "rule", **omission.high))
        difference = high.peak_allocated_bytes - low.peak_allocated_bytes
        text = omission.text.format(
            low=gib(low.peak_allocated_bytes), high=gib(high.peak_allocated_bytes), device=gib(high.device_bytes),
            reserved=gib(high.peak_reserved_bytes), weights=_weights(high), said=said, weights_8b=weights_8b,
            said_8b=said_8b,
        )  # fmt: skip
        title = omission.title + (f": {gib(difference)}" if difference else "")
        yield f"### {title}\n\n{fill(text, WIDTH, break_on_hyphens=False)}\n"


def _weights(found: Estimate) -> str:
    return gib(found.moments[0].ledger.parameters)


def write_page() -> str:
    """Return the page."""
    matrix, omissions = "\n".join(list_matrix()), "\n".join(list_omissions())
    return f"""# What the rule of thumb leaves out

Generated by `python benchmarks/rule_of_thumb.py`; do not edit. `brim plan --by rule` answers with the field's heuristic
as it is told: 0.5 GB per billion parameters in 4-bit, 2 GB in 16-bit, 2 GB aside, a table of batches per card. It is
quick, and about right for a 4-bit 7B model and a few hundred tokens. Its error on published runs stands beside the
formula's in [accuracy.md](accuracy.md).

## Its own table, costed

The batches the rule recommends for 4-bit models: what it says they take, and the peak by the formula (QLoRA in the HF
Trainer with full checkpointing), in GiB. **no**: with fragments and context it is more than the card has.

| card, model, batch | rule | {" | ".join(f"{length:,} tokens" for length in LENGTHS)} |
|---|---|{"---|" * len(LENGTHS)}
{matrix}

## What each omission costs

Llama-3.1-8B, 2,048 tokens, micro-batch 4 and full checkpointing where nothing else is said; peaks of the allocator.
Each figure is the difference between two jobs that differ in that one thing.

{omissions}
`brim estimate MODEL ... --by rule,formula` shows both answers side by side for any job, row by row.
"""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.parse_args().out.write_text(write_page(), encoding="utf-8")


if __name__ == "__main__":
    main()

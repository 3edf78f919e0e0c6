#!/usr/bin/env python3
"""The formula beside the trace, ledger row by row, on real cards: architecture x method x checkpointing.

    python benchmarks/formula_trace.py --out benchmarks/results/formula_trace.jsonl [--only NAME]

Both answer the same question; the trace runs the model's own code, so where the two differ the formula is wrong, or
does not know something. `benchmarks/accuracy.py --report` writes the table into docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from brim import api
from brim.cost.ledger import Estimate, Ledger, Moment
from brim.errors import BrimError

_DECODERS = (
    "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B", "google/gemma-2-9b", "microsoft/phi-4", "mistralai/Mistral-7B-v0.1",
)  # fmt: skip
_LORA = {"method": "lora", "lora_targets": "all-linear"}
CASES: tuple[dict[str, Any], ...] = (
    *({"model": name, "method": method, "activation_checkpointing": kind}
      for name in _DECODERS for method in ("full", "lora") for kind in ("none", "full")),
    *({"model": name, "method": "qlora", "activation_checkpointing": "full"} for name in _DECODERS[:2]),
    *({"model": "meta-llama/Llama-3.1-8B", "method": "qlora", "quantization": "int8", "activation_checkpointing": kind}
      for kind in ("none", "full")),
    {"model": "meta-llama/Llama-3.1-8B", "method": "lora", "activation_checkpointing": "selective", "trainer": "trl"},
    {"model": "meta-llama/Llama-3.1-8B", "method": "qlora", "activation_checkpointing": "none", "trainer": "trl"},
    *({"model": "Qwen/Qwen3-8B", "method": "qlora", "activation_checkpointing": kind, "trainer": "unsloth"}
      for kind in ("none", "full")),
    {"model": "meta-llama/Llama-3.2-1B", "method": "full", "activation_checkpointing": "none", "trainer": "plain"},
    {"model": "meta-llama/Llama-3.2-1B", "method": "full", "activation_checkpointing": "full",
     "optimizer": "adafactor"},
    {"model": "Qwen/Qwen2.5-1.5B", "method": "full", "activation_checkpointing": "full", "optimizer": "adamw-8bit"},
    {"model": "Qwen/Qwen2.5-1.5B", "method": "full", "activation_checkpointing": "none", "dtype": "fp32"},
    {"model": "Qwen/Qwen2.5-1.5B", "method": "full", "activation_checkpointing": "none", "dtype": "fp32",
     "seq_len": 1024, "micro_batch_size": 1},
    *({"model": "tiiuae/falcon-7b", "method": "lora", "activation_checkpointing": kind, "seq_len": 1024}
      for kind in ("none", "full")),
    {"model": "tiiuae/falcon-7b", "method": "lora", "activation_checkpointing": "none", "dtype": "fp32",
     "seq_len": 1024},
    {"model": "meta-llama/Llama-3.2-1B", "method": "lora", "activation_checkpointing": "none", "dtype": "fp16",
     "gpu": "t4", "seq_len": 1024, "micro_batch_size": 1},
    {"model": "facebook/opt-1.3b", "method": "lora", "activation_checkpointing": "full"},
    {"model": "facebook/bart-base", "method": "full", "activation_checkpointing": "none", "seq_len": 1024},
    {"model": "openai-community/gpt2", "method": "full", "activation_checkpointing": "none", "seq_len": 1024},
    {"model": "mistralai/Mixtral-8x7B-v0.1", "method": "lora", "activation_checkpointing": "full"},
    {"model": "Qwen/Qwen3-30B-A3B", "method": "lora", "activation_checkpointing": "full"},
    {"model": "deepseek-ai/DeepSeek-V2-Lite", "method": "full", "activation_checkpointing": "full"},
    {"model": "google-t5/t5-base", "method": "full", "activation_checkpointing": "none", "seq_len": 512,
     "trainer": "transformers"},
    {"model": "google-bert/bert-base-uncased", "method": "full", "activation_checkpointing": "none", "seq_len": 512,
     "trainer": "transformers"},
    {"model": "answerdotai/ModernBERT-base", "method": "full", "activation_checkpointing": "none", "seq_len": 1024,
     "trainer": "transformers"},
    {"model": "google/vit-base-patch16-224", "method": "full", "activation_checkpointing": "none",
     "trainer": "transformers"},
)  # fmt: skip
_SHARED = {"gpu": "h100", "trainer": "transformers", "micro_batch_size": 2, "gradient_accumulation_steps": 2}
ROWS = tuple(row.name for row in fields(Ledger))


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Return both answers to a case: totals, and the ledger at the moment of the trace's peak."""
    options = {**_SHARED, **case}
    try:
        formula, trace = api.estimate(options.pop("model"), by=("formula", "trace"), history=False, **options)
    except BrimError as error:
        return {**case, "refused": str(error)}
    moment = trace.peak_moment
    return {
        **case, "moment": moment, "formula_moment": formula.peak_moment,
        "formula": _totals(formula), "trace": _totals(trace),
        "formula_ledger": _ledger(_moment(formula, moment)), "trace_ledger": _ledger(_moment(trace, moment)),
        "moments": {one.name: [_total(_moment(formula, one.name)), one.total_bytes] for one in trace.moments},
    }  # fmt: skip


def _totals(estimate: Estimate) -> dict[str, int]:
    return {"allocated": estimate.peak_allocated_bytes, "reserved": estimate.peak_reserved_bytes}


def _moment(estimate: Estimate, name: str) -> Moment | None:
    """Return a moment by the trace's name; the formula's layers of several kinds are moments of their own."""
    plural = name.replace("of layers", "of layer group")
    groups = plural if plural != name else None
    found = [one for one in estimate.moments if one.name == name or (groups and one.name.startswith(groups))]
    return max(found, key=lambda one: one.total_bytes, default=None)


def _total(moment: Moment | None) -> int | None:
    return moment.total_bytes if moment else None


def _ledger(moment: Moment | None) -> dict[str, int] | None:
    return {row: getattr(moment.ledger, row) for row in ROWS} if moment else None


def run(only: str | None) -> Iterator[dict[str, Any]]:
    """Yield the comparison of every case."""
    for case in CASES:
        if only is None or only in json.dumps(case):
            yield compare(case)


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = []
    for result in run(options.only):
        found.append(json.dumps(result) + "\n")
        print(_line(result), flush=True)
    if options.out:
        options.out.write_text("".join(found), encoding="utf-8")
    return 0


def _line(result: dict[str, Any]) -> str:
    case = ", ".join(str(result[key]) for key in ("model", "method", "activation_checkpointing") if key in result)
    extra = ", ".join(str(result[key]) for key in ("trainer", "optimizer", "quantization", "dtype") if key in result)
    if "refused" in result:
        return f"   -    {case} {extra}: {result['refused']}"
    formula, trace = result["formula"], result["trace"]
    moments = "; ".join(
        f"{name} {one / other - 1:+.1%}" for name, (one, other) in result["moments"].items() if one and other
    )
    return (
        f"{formula['allocated'] / trace['allocated'] - 1:+7.2%} {case} {extra}: {formula['allocated'] / 2**30:.2f} at "
        f"{result['formula_moment']}, {trace['allocated'] / 2**30:.2f} GiB at {result['moment']}; reserved "
        f"{formula['reserved'] / trace['reserved'] - 1:+.1%} [{moments}]"
    )


if __name__ == "__main__":
    sys.exit(main())

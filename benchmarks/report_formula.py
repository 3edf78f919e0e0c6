"""The table of the formula beside the trace, from the results of benchmarks/formula_trace.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results/formula_trace.jsonl"
GIB = 2**30
_SETTINGS = ("method", "quantization", "dtype", "optimizer", "activation_checkpointing", "trainer", "gpu")
_CAUSES = {
    "Unsloth without checkpointing": "temporaries of its fused loss, about 0.15 GiB in the forward pass; open",
    "encoders": "the normalisation of the embeddings, and what T5's encoder keeps after its last layer",
}
_ROWS = ("parameters", "gradients", "optimizer_states", "activations", "temporaries")


def compare_answerers(path: Path = RESULTS) -> str:
    """Return the comparison as text and table: peaks, then the rows of the ledger at the trace's peak."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answered = [one for one in found if "refused" not in one]
    errors = sorted(abs(_error(one)) for one in answered)
    within = sum(error <= 0.01 for error in errors)
    head = (
        f"`python benchmarks/formula_trace.py`: {len(found)} cases on an H100, micro-batch 2 x accumulation 2, 2,048 "
        f"tokens unless said. The formula is within 1 % of the trace's allocated peak in {within} of {len(answered)}, "
        f"and off by {errors[-1]:.1%} at most. Rows are the formula's bytes less the trace's at the moment of the "
        "trace's peak, GiB.\n\n"
    )
    columns = ["case", "trace GiB", "formula", "reserved", *(row.replace("_", " ") for row in _ROWS)]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [_line(one) for one in answered]
    causes = [f"\n- **{name}**: {cause}." for name, cause in _CAUSES.items()]
    refused = [f"\n\nNot answered: {_case(one)}: {one['refused']}" for one in found if "refused" in one]
    return head + "\n".join([*lines, *causes]) + "".join(refused)


def _error(one: dict[str, Any]) -> float:
    return one["formula"]["allocated"] / one["trace"]["allocated"] - 1


def _case(one: dict[str, Any]) -> str:
    words = [str(one[key]) for key in _SETTINGS if key in one]
    length = [f"{one['seq_len']:,} tokens"] if "seq_len" in one else []
    return ", ".join([one["model"], *words, *length])


def _line(one: dict[str, Any]) -> str:
    reserved = one["formula"]["reserved"] / one["trace"]["reserved"] - 1
    cells = [_case(one), f"{one['trace']['allocated'] / GIB:.2f}", f"{_error(one):+.2%}", f"{reserved:+.1%}"]
    ledgers = one["formula_ledger"], one["trace_ledger"]
    for row in _ROWS:
        cells.append("-" if ledgers[0] is None else f"{(ledgers[0][row] - ledgers[1][row]) / GIB:+.2f}")
    return f"| {' | '.join(cells)} |"

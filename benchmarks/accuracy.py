#!/usr/bin/env python3
"""Predict published memory measurements, and write how far off brim is.

    python benchmarks/accuracy.py TRUTH.jsonl --by formula --out PREDICTIONS.jsonl
    python benchmarks/accuracy.py benchmarks/truth/memory.jsonl --report [--traced PREDICTIONS.jsonl]

The predictor is handed each row without its id, group, weight, measurement, source and notes. `--report` scores the
trace, the formula, the rule of thumb and a states-only baseline, and writes docs/accuracy.md and tables/accuracy.toml.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from brim.cost.estimate import estimate
from brim.cost.overhead import context_bytes
from brim.cost.rule import estimate_rule
from brim.cost.states import count_states
from brim.errors import BrimError
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from report_accuracy import write_report
from rows import HIDDEN_FROM_PREDICTOR, read_row, read_row_config

Row = dict[str, Any]
Answer = dict[str, int]


def _by_formula(workload: Workload, strategy: Strategy) -> Answer:
    answer = estimate(workload, strategy)
    return {
        "peak_allocated_bytes": answer.peak_allocated_bytes,
        "peak_reserved_bytes": answer.peak_reserved_bytes,
        "baseline_reserved_bytes": 2 * 2**20,
        "device_bytes": answer.device_bytes,
    }


def _by_rule(workload: Workload, strategy: Strategy) -> Answer:
    peak = estimate_rule(workload, strategy).peak_allocated_bytes
    return {"peak_allocated_bytes": peak, "peak_reserved_bytes": peak, "device_bytes": peak}


def _by_states(workload: Workload, strategy: Strategy) -> Answer:
    states = count_states(workload.model, workload.recipe)
    total = states.parameters_bytes + states.gradients_bytes + states.optimizer_bytes
    device = total + context_bytes(workload.cluster.device)
    return {"peak_allocated_bytes": total, "peak_reserved_bytes": total, "device_bytes": device}


def _by_trace(workload: Workload, strategy: Strategy, config: Mapping[str, Any]) -> Answer:
    from brim.probes.model import build_from_config
    from brim.probes.trace import trace

    architecture, kernel, dtype = workload.model.architecture, strategy.attention_kernel, workload.recipe.weight_dtype
    answer = trace(workload, strategy, lambda: build_from_config(config, architecture, kernel, dtype))
    return {
        "peak_allocated_bytes": answer.peak_allocated_bytes, "peak_reserved_bytes": answer.peak_reserved_bytes,
        "baseline_reserved_bytes": 2 * 2**20, "device_bytes": answer.device_bytes,
    }  # fmt: skip


ANSWERERS: dict[str, Callable[[Workload, Strategy], Answer]] = {
    "formula": _by_formula,
    "rule": _by_rule,
    "states": _by_states,
}
_TRACED: dict[str, Answer | dict[str, str]] = {}


def predict(row: Row, by: str) -> Answer | dict[str, str]:
    """Return the predicted bytes of one row, or why there are none. Sees no field that identifies the row."""
    question = {key: value for key, value in row.items() if key not in HIDDEN_FROM_PREDICTOR}
    if by == "trace":  # seconds each, and rows that differ in the counter only are one question
        asked = json.dumps(question, sort_keys=True)
        if asked not in _TRACED:
            _TRACED[asked] = _predict_by_trace(question)
        return _TRACED[asked]
    try:
        return ANSWERERS[by](*read_row(question))
    except BrimError as error:
        return {"unsupported": str(error)}


def _predict_by_trace(question: Row) -> Answer | dict[str, str]:
    try:
        return _by_trace(*read_row(question), read_row_config(question))
    except BrimError as error:
        return {"unsupported": str(error)}


def predict_all(rows: Iterable[Row], by: str) -> list[Row]:
    """Return one prediction a row, in order."""
    return [{"id": row["id"], **predict(row, by)} for row in rows]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a truth file, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("truth", type=Path, metavar="TRUTH.jsonl")
    parser.add_argument("--by", choices=sorted((*ANSWERERS, "trace")), default="formula")
    parser.add_argument("--out", type=Path, metavar="PREDICTIONS.jsonl")
    parser.add_argument("--report", action="store_true", help="write docs/accuracy.md and tables/accuracy.toml")
    parser.add_argument("--traced", type=Path, metavar="PREDICTIONS.jsonl", help="with --report: what --by trace wrote")
    options = parser.parse_args()
    rows = read_rows(options.truth)
    if options.report:
        answers = {by: predict_all(rows, by) for by in ANSWERERS}
        answers["trace"] = read_rows(options.traced) if options.traced else predict_all(rows, "trace")
        write_report(rows, answers)
        return 0
    lines = "".join(json.dumps(prediction) + "\n" for prediction in predict_all(rows, options.by))
    if options.out:
        options.out.write_text(lines, encoding="utf-8")
    else:
        sys.stdout.write(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Predict tokens per second for published runs: one GPU, or data parallelism alone on one node.

    python benchmarks/throughput.py TRUTH.jsonl --out PREDICTIONS.jsonl
    python ../shared/truth/score.py TRUTH.jsonl PREDICTIONS.jsonl --by source

Rows are stripped of everything measured before they are read. What the law does not time (tensor, pipeline, context
and expert parallelism, several nodes, 8-bit arithmetic) is marked `unsupported`, never guessed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from brim.cost.steptime import step_time
from brim.errors import BrimError, UnsupportedModel
from brim.spec.strategy import Mesh, Strategy
from brim.spec.workload import Workload
from rows import HIDDEN_FROM_PREDICTOR, read_row

Row = Mapping[str, Any]
_DEVICES_OF_A_NODE = 8
_DTYPES = ("bf16", "fp16", "fp32", None)


def predict(row: Row) -> dict[str, Any]:
    """Return the prediction for a stripped row: tokens per second and GPU, or why there is none."""
    try:
        workload, strategy = _read(row)
        time = step_time(workload, strategy)
    except BrimError as error:
        return {"unsupported": str(error)}
    if time is None:
        return {"unsupported": "the device or the mesh has no known rates"}
    return {"tokens_per_second_per_gpu": time.tokens_per_second_per_device}


def _read(row: Row) -> tuple[Workload, Strategy]:
    """Return the question; sharding is put on top of the single-GPU reading of the row."""
    mesh, gpus = row["mesh"], row["n_gpus"]
    ranks = mesh["dp_replicate"] * mesh["dp_shard"]
    if ranks != gpus or gpus > _DEVICES_OF_A_NODE or mesh["ep"] != 1:
        raise UnsupportedModel(model=row["model"]["name"], what=f"the mesh of {gpus} GPUs", advice="planned for later")
    if row["compute_dtype"] not in _DTYPES:
        raise UnsupportedModel(model=row["model"]["name"], what=f"{row['compute_dtype']} products", advice="none")
    workload, strategy = read_row({**row, "n_gpus": 1})
    if gpus == 1:
        return workload, strategy
    zero_stage = row["zero_stage"] or 0
    axes = Mesh(dp_shard=gpus) if zero_stage == 3 else Mesh(dp_replicate=gpus)
    cluster = replace(workload.cluster, devices_per_node=gpus)
    return replace(workload, cluster=cluster), replace(strategy, mesh=axes, zero_stage=zero_stage)


def predict_file(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the prediction for every row of a truth file that states a speed."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("tokens_per_second"):
            stripped = {key: value for key, value in row.items() if key not in HIDDEN_FROM_PREDICTOR}
            yield {"id": row["id"], **predict(stripped)}


def main() -> None:
    """Read a truth file, write predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    predictions = list(predict_file(arguments.truth))
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in predictions), encoding="utf-8")
    timed = sum("unsupported" not in row for row in predictions)
    print(f"{timed} of {len(predictions)} rows predicted, written to {arguments.out}")


if __name__ == "__main__":
    main()

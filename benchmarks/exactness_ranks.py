"""Every class of the exactness table on 2 and 4 ranks, DDP and FSDP2, under `brim.accumulate`.

    python benchmarks/exactness_ranks.py --ranks 2 --sharding ddp      # starts itself under torchrun

A plain loop over gloo on the CPU; each rank holds its share of a window of 8 sequences, and a partial window where the
ranks can share it. Rows go to benchmarks/results/exactness_ranks.jsonl as they come; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "exactness_ranks.jsonl"
Row = dict[str, Any]


def start(ranks: int, sharding: str) -> int:
    """Run this script once on each rank; return torchrun's exit code."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__,
        "--sharding", sharding,
    ]  # fmt: skip
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


def measure(sharding: str) -> None:
    """Measure every class that has no row yet; rank 0 writes."""
    import torch
    import torch.distributed as dist
    import transformers

    from exactness_cases import CASES

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    done = {(row["class"], row["ranks"], row["sharding"]) for row in read_rows()}
    for case in CASES:
        if (case.name, ranks, sharding) in done:
            continue
        begin = time.monotonic()
        row = {"class": case.name, "ranks": ranks, "sharding": sharding, "transformers": transformers.__version__,
               "torch": torch.__version__, **prove(case, ranks, sharding)}  # fmt: skip
        if rank == 0:
            with OUT.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{case.name} {ranks} {sharding} {time.monotonic() - begin:.0f} s: {row}", flush=True)
    dist.destroy_process_group()


def prove(case: Any, ranks: int, sharding: str) -> Row:
    """Return the worst error of a class, or why there is none. Every rank fails alike or none does."""
    import transformers

    from brim.checks.accumulation import verify_accumulation
    from brim.checks.subjects import build_subject
    from brim.errors import InseparableLoss
    from brim.runtime.accumulate import accumulate
    from exactness import merge

    config = merge(getattr(transformers, case.architecture).config_class().to_dict(), case.numbers or {})
    for rows in ("uneven", "equal"):  # of one length for a class that padding changes
        try:
            subject = build_subject(
                config, case.architecture, "plain", exactly=accumulate, num_ranks=ranks, sharding=sharding,
                equal_lengths=rows == "equal",
            )  # fmt: skip
            report = verify_accumulation(subject)
        except InseparableLoss as error:
            found: Row = {"refused": error.reason}
            continue
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        found = {"exact": report.exact, "error": float(f"{report.worst.error:.2e}"), "causes": list(report.causes),
                 "rows": rows}  # fmt: skip
        if report.padding_error <= 1e-5:
            break
    return found


def read_rows() -> list[Row]:
    """Return what was measured before."""
    return [json.loads(line) for line in OUT.read_text(encoding="utf-8").splitlines()] if OUT.exists() else []


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sharding", choices=("ddp", "fsdp2"), default="ddp")
    given = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        sys.exit(start(given.ranks, given.sharding))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    measure(given.sharding)


if __name__ == "__main__":
    main()

"""Every class of the exactness table on 2 and 4 ranks, DDP and FSDP2, under brim, in every loop.

    python benchmarks/exactness_ranks.py --loop hf --ranks 2 --sharding ddp      # starts itself under torchrun

Over gloo on the CPU; each rank holds its share of a window of 8 sequences, and of a window of 4 where the ranks can
share it. Rows go to benchmarks/results/exactness_ranks.jsonl as they come; what is there is not run again, unless
--again names it. Ranks of which one has failed are started anew for the next class.
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
from collections.abc import Mapping
from contextlib import redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "exactness_ranks.jsonl"
LOOPS = ("plain", "hf", "sft", "accelerate", "lightning")
SHARDINGS = ("ddp", "fsdp2")
_LONGEST_WAIT = timedelta(seconds=90)
"""How long a rank waits for another one in a collective."""

Row = dict[str, Any]


def start(loop: str, ranks: int, sharding: str, only: str) -> int:
    """Run this script once on each rank until every class has its row; return torchrun's last exit code."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__,
        "--loop", loop, "--sharding", sharding, "--only", only,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    while True:
        before = len(read_rows())
        code = subprocess.run(command, env=environment, check=False).returncode
        if not code or len(read_rows()) == before:
            return code


def measure(loop: str, sharding: str, only: str) -> None:
    """Measure every class that has no row yet; rank 0 writes. Ends with the first class that fails."""
    import torch
    import torch.distributed as dist
    import transformers

    from exactness_cases import CASES

    dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    torch.set_num_threads(1)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    done = {find_key(row) for row in read_rows()}
    for case in CASES:
        row: Row = {"class": case.name, "loop": loop, "ranks": ranks, "sharding": sharding}
        if find_key(row) in done or only not in case.name or loop not in (*case.loops, "plain"):
            continue
        begin = time.monotonic()
        row |= {"transformers": transformers.__version__, "torch": torch.__version__}
        found, lost = prove(case, loop, ranks, sharding)
        row |= found
        if rank == 0:
            with OUT.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{time.monotonic() - begin:.0f} s: {row}", flush=True)
        if lost:  # nobody knows what the others still wait for
            time.sleep(0 if rank == 0 else 5)
            os._exit(1)
    dist.destroy_process_group()


def prove(case: Any, loop: str, ranks: int, sharding: str) -> tuple[Row, bool]:
    """Return the worst error of a class, or why there is none, and whether ranks may have lost each other."""
    import transformers

    from brim.checks.accumulation import verify_accumulation
    from brim.checks.subjects import build_subject
    from brim.errors import InseparableLoss, InvalidInput, ProbeFailed
    from brim.runtime.forms import find_exact_form
    from exactness import merge

    config = merge(getattr(transformers, case.architecture).config_class().to_dict(), case.numbers or {})
    for rows in ("uneven", "equal"):  # of one length for a class that padding changes
        try:
            subject = build_subject(
                config, case.architecture, loop, exactly=find_exact_form(loop), num_ranks=ranks, sharding=sharding,
                equal_lengths=rows == "equal",
            )  # fmt: skip
            report = verify_accumulation(subject)
        except InseparableLoss as error:
            found: Row = {"refused": error.reason}
            continue
        except InvalidInput as error:
            return {"refused": str(error)}, False
        except ProbeFailed as error:
            return {"failed": str(error)}, False
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}, True
        found = {"exact": report.exact, "error": float(f"{report.worst.error:.2e}"), "causes": list(report.causes),
                 "rows": rows}  # fmt: skip
        if report.padding_error <= 1e-5:
            break
    return found, False


def read_rows() -> list[Row]:
    """Return what was measured before."""
    return [json.loads(line) for line in OUT.read_text(encoding="utf-8").splitlines()] if OUT.exists() else []


def find_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a row is known by."""
    return row["class"], row["loop"], row["ranks"], row["sharding"]


def forget(loop: str, ranks: int, sharding: str, again: str) -> None:
    """Take out the rows that are to be measured anew."""
    mine = (loop, ranks, sharding)
    kept = [row for row in read_rows() if again not in row["class"] or find_key(row)[1:] != mine]
    OUT.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def sort_rows() -> None:
    """Put the rows in the table's order, however the runs came."""
    from exactness_cases import CASES

    order = {case.name: index for index, case in enumerate(CASES)}

    def place(row: Row) -> tuple[Any, ...]:
        return LOOPS.index(row["loop"]), row["ranks"], row["sharding"], order.get(row["class"], len(order))

    rows = sorted(read_rows(), key=place)
    OUT.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=LOOPS, default="plain")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sharding", choices=SHARDINGS, default="ddp")
    parser.add_argument("--only", default="", help="classes whose name contains this")
    parser.add_argument("--again", help="measure anew the classes whose name contains this; '' for all")
    given = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        if given.again is not None:
            forget(given.loop, given.ranks, given.sharding, given.again)
        code = start(given.loop, given.ranks, given.sharding, given.only)
        sort_rows()
        sys.exit(code)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        measure(given.loop, given.sharding, given.only)


if __name__ == "__main__":
    main()

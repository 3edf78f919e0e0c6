"""Verify on several ranks: the same command again under torchrun, on the CPU with gloo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brim.errors import InvalidInput, ProbeFailed

_OUT = "BRIM_VERIFY_OUT"
"""File into which rank 0 writes its report."""
_LONGEST_SECONDS = 600


def count_ranks() -> int:
    """Return how many ranks this process is one of, by the environment that torchrun sets."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this process is the first of its ranks, which alone speaks."""
    return os.environ.get("RANK", "0") == "0"


def join_ranks() -> None:
    """Join the process group of this process's ranks, if there is more than one and nobody has."""
    import torch.distributed as dist

    if count_ranks() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def leave_report(document: dict[str, Any]) -> bool:
    """Write rank 0's report where the process that started the ranks reads it; False if nobody waits for one."""
    path = os.environ.get(_OUT)
    if path is None:
        return False
    if is_first():
        Path(path).write_text(json.dumps(document), encoding="utf-8")
    return True


def run_ranks(words: Sequence[str], num_ranks: int) -> dict[str, Any]:
    """Return the report of `brim verify WORDS` on some ranks of this machine.

    Args:
        words: arguments after `verify`, without `--ranks`.
        num_ranks: processes; 2, 4 or 8.

    Raises:
        InvalidInput: a number of ranks that a window of 8 sequences does not split over.
        ProbeFailed: the ranks died or ran longer than ten minutes; the text has their last line.
    """
    if num_ranks not in (2, 4, 8):
        raise InvalidInput(f"--ranks must be 1, 2, 4 or 8, not {num_ranks}")
    with tempfile.TemporaryDirectory(prefix="brim-verify-") as folder:
        out = os.path.join(folder, "report.json")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks),
            "-m", "brim", "verify", *words,
        ]  # fmt: skip
        environment = {**os.environ, _OUT: out, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_LONGEST_SECONDS, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            raise ProbeFailed(f"{num_ranks} ranks gave no answer in {_LONGEST_SECONDS} seconds") from None
        if not os.path.exists(out):
            raise ProbeFailed(f"{num_ranks} ranks gave no answer: {_last_error(done.stdout + done.stderr)}")
        return json.loads(Path(out).read_text(encoding="utf-8"))


def _last_error(text: str) -> str:
    """Return the first line that names an error, of all ranks' output."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("error:") or ("Error" in line and ":" in line)]
    return re.sub(r"^error: (internal: )?", "", (named or lines or ["no output"])[0])[:300]

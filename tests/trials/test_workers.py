"""The child process: whatever happens in it is an answer, and nothing is left for the next request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_job import make_plan, make_request, write_script

from brim.trials.workers import Worker, describe_code
from brim.units import MIB


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as one:
        yield one


def test_an_out_of_memory_ends_the_child_alone_and_leaves_nothing(worker: Worker, tmp_path: Path) -> None:
    """A probe in one process hands its cache, and what an error still holds, to the next."""
    plan = make_plan(tmp_path, micro_batch_size=2)
    before = worker.run(make_request(plan))
    assert worker.run(make_request(plan, 1 * MIB)).ending == "oom"
    after = worker.run(make_request(plan))
    assert before.ending == after.ending == "done"
    assert before.peak_allocated_bytes == after.peak_allocated_bytes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals")
def test_a_crash_is_an_answer(worker: Worker, tmp_path: Path) -> None:
    script = write_script(tmp_path, "print('last words', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    answer = worker.run(make_request(make_plan(tmp_path), script=script))
    assert answer.ending == "lost"
    assert "SIGKILL" in answer.problem and "last words" in answer.problem
    assert worker.run(make_request(make_plan(tmp_path, micro_batch_size=1))).ending == "done"


def test_a_hang_ends(worker: Worker, tmp_path: Path) -> None:
    script = write_script(tmp_path, "time.sleep(600)")
    worker.longest_seconds = 12.0
    answer = worker.run(make_request(make_plan(tmp_path), script=script))
    worker.longest_seconds = 600.0
    assert answer.ending == "lost" and "no end after 12 s" in answer.problem


@pytest.mark.skipif(not hasattr(os, "fork"), reason="process groups")
def test_the_child_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom brim.trials.workers import Worker\nworker = Worker()\nworker._start()\n"
        "print(worker._process.pid, flush=True)\nsys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 30
    while time.monotonic() < until and is_running(child):
        time.sleep(0.2)
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_ends_are_told_in_words() -> None:
    assert describe_code(1) == "the process ended with exit code 1 and no answer"
    assert describe_code(-9) == "the process was killed by SIGKILL (the host ran out of memory?)"
    assert describe_code(-11) == "the process was killed by SIGSEGV"

"""The child process: it has imported what a step needs, and runs every request in a process of its own.

    python -m brim.trials.child FOLDER          waits for lines on stdin, each naming a request in the folder

A request `N.pickle` is answered by `N.json` beside it. Whatever it does to its process (an out-of-memory, a crash, a
hang) is over with it: nothing is left for the next one, no cache, no allocator, no model. Where processes can be forked
the imports are paid once; elsewhere each request pays them.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from brim.files import write_text
from brim.trials.request import Answer, Request

READY = "ready"
STARTED = "started"
"""Lines to the parent: the imports are done; a request runs in the process of the number that follows."""
Perform = Callable[[Request], Answer]


def serve(folder: Path) -> None:
    """Answer requests until stdin ends."""
    from brim.trials.perform import perform

    forks = hasattr(os, "fork")
    print(READY, flush=True)
    for line in sys.stdin:
        number = line.strip()
        if forks:
            run_forked(folder, number, perform)
        else:
            print(f"{STARTED} {os.getpid()}", flush=True)
            answer_file(folder, number, perform)
            return


def run_forked(folder: Path, number: str, perform: Perform) -> None:
    """Run a request in a process group of its own, and wait for its end."""
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setsid()
            answer_file(folder, number, perform)
            code = 0
        finally:
            os._exit(code)
    print(f"{STARTED} {child}", flush=True)
    _, status = os.waitpid(child, 0)
    print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


def answer_file(folder: Path, number: str, perform: Perform) -> None:
    """Run the request of a number and write its answer: whole or not at all."""
    silence(folder / f"{number}.log")
    request = pickle.loads((folder / f"{number}.pickle").read_bytes())
    answer = perform(request)
    write_text(folder / f"{number}.json", json.dumps(asdict(answer)))


def silence(log: Path) -> None:
    """Send what the libraries print into a file: stdout belongs to the parent."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)


def read_answer(text: str) -> Answer:
    """Return the answer that a child wrote."""
    found = Answer(**json.loads(text))
    return replace(
        found, seconds={int(count): seconds for count, seconds in found.seconds.items()},
        versions=tuple((name, release) for name, release in found.versions), notes=tuple(found.notes),
    )  # fmt: skip


if __name__ == "__main__":
    serve(Path(sys.argv[1]))

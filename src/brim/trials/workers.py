"""The parent's side of the child process: started once, asked again and again, ended whatever happens."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from brim.errors import ProbeFailed, quoted
from brim.trials.child import READY, STARTED, read_answer
from brim.trials.request import Answer, Request

LONGEST_SECONDS = 600.0
"""How long a strategy may take for its few steps, imports left out."""
_IMPORT_SECONDS = 300.0
_LOOK_SECONDS = 0.2


class Worker:
    """A child process that runs requests.

        with Worker() as worker:
            answer = worker.run(request)
    """

    def __init__(self, longest_seconds: float = LONGEST_SECONDS) -> None:
        """Start nothing yet.

        Args:
            longest_seconds: after this a request counts as hung and its process is killed.
        """
        self.longest_seconds = longest_seconds
        self._folder = tempfile.TemporaryDirectory(prefix="brim-trial-")
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._number = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child, and what it is running."""
        self._stop()
        self._folder.cleanup()

    def run(self, request: Request, is_lost: Callable[[], bool] = lambda: False) -> Answer:
        """Return the answer to a request; a process that dies or hangs is an answer too.

        Args:
            request: what to run.
            is_lost: asked again and again: whether another rank has died, so that this one waits for nothing.

        Raises:
            ProbeFailed: the child cannot be started.
        """
        self._start()
        number, folder = str(self._number), Path(self._folder.name)
        self._number += 1
        (folder / f"{number}.pickle").write_bytes(pickle.dumps(request))
        ending = self._wait(number, is_lost)
        written = folder / f"{number}.json"
        if written.exists():
            return read_answer(written.read_text(encoding="utf-8"))
        last = _read_last(folder / f"{number}.log")
        return Answer(ending="lost", problem=f"{ending}; its last line: {last}" if last else ending)

    def _wait(self, number: str, is_lost: Callable[[], bool]) -> str:
        """Wait until the process of a request has ended, kill it where it does not; return how it ended."""
        process = self._process
        assert process is not None and process.stdin is not None
        process.stdin.write(number + "\n")
        process.stdin.flush()
        until, child = time.monotonic() + self.longest_seconds, 0
        while True:
            line = self._read(_LOOK_SECONDS)
            if line is None:  # the server itself is gone
                code = process.wait()
                self._process = None
                return describe_code(code)
            word, _, rest = line.partition(" ")
            if word == STARTED:
                child = int(rest)
            elif word == "ended":
                return describe_code(int(rest))
            hung = time.monotonic() > until
            if hung or is_lost():
                _kill(child)
                self._stop()
                return f"no end after {self.longest_seconds:.0f} s" if hung else "another rank has died"

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        log = open(Path(self._folder.name, "server.log"), "a", encoding="utf-8")  # noqa: SIM115 the child's own
        with log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "brim.trials.child", self._folder.name], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                env=_environment(self._folder.name),
            )  # fmt: skip
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(self._process, self._lines), daemon=True).start()
        until = time.monotonic() + _IMPORT_SECONDS
        while (line := self._read(_LOOK_SECONDS)) != READY:
            if line is None or time.monotonic() > until:
                self._stop()
                last = _read_last(Path(self._folder.name, "server.log"))
                raise ProbeFailed(f"the trial's child process did not start: {last or 'no output'}")

    def _read(self, seconds: float) -> str | None:
        """Return the next line of the child; empty if none came in time, None if there will be none."""
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return ""

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            _kill(process.pid)
            process.wait()


def _forward(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line.strip())
    lines.put(None)


def _environment(folder: str) -> dict[str, str]:
    """Nothing of a run goes to a hub or a tracker, what it writes for itself goes with the folder; what the user set
    for the allocator stays."""
    return {
        **os.environ, "TMPDIR": folder, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
    }  # fmt: skip


def _kill(process: int) -> None:
    """Kill a process and its group."""
    if not process:
        return
    try:
        if hasattr(os, "killpg"):
            os.killpg(process, signal.SIGKILL)
        else:
            os.kill(process, signal.SIGTERM)
    except OSError:  # gone already
        return


def describe_code(code: int) -> str:
    """Return how a process ended, in words."""
    if code >= 0:
        return f"the process ended with exit code {code} and no answer"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    why = " (the host ran out of memory?)" if name == "SIGKILL" else ""
    return f"the process was killed by {name}{why}"


def _read_last(path: Path) -> str:
    """Return the last line of a log that says something."""
    if not path.exists():
        return ""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return quoted(next((line for line in reversed(lines) if line), ""))[1:-1]

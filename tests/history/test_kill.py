"""Eight processes write at once and are killed at random moments: what was committed stays, and nothing breaks."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

WRITERS, ROUNDS = 8, 4

SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
logs, writers, rounds = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
from observed import observe
from brim.history.document import check, identify
from brim.history.privacy import strip_names
from brim.history.runs import add_observation, list_observations
from dataclasses import replace
run = observe()
identify(check(strip_names(run)))  # everything that is slow to import is imported before the first fork
random.seed(7)

def write(writer):
    with open(logs / str(writer), "ab", buffering=0) as log:
        for number in range(2_000):
            mine = replace(run, num_steps=1 + number, num_retries=writer)
            said = add_observation(mine)
            key = said or identify(check(strip_names(mine)))
            log.write((key + "\\n").encode())
            os.fsync(log.fileno())

def count_lines(log):
    return log.read_bytes().count(b"\\n") if log.exists() else 0

for turn in range(rounds):
    children = []
    for writer in range(writers):
        child = os.fork()
        if child == 0:
            try:
                write(writers * turn + writer)
            finally:
                os._exit(1)
        children.append((child, writers * turn + writer))
    random.shuffle(children)
    for child, writer in children:  # how far it has come decides, not the clock: the machine may be busy
        wanted = random.randrange(4)
        while wanted and count_lines(logs / str(writer)) < wanted:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
    list_observations()
    for child, _ in children:
        os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_writers_lose_nothing_and_break_nothing(store: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    words = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), str(logs), str(WRITERS), str(ROUNDS)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    noted = [line for log in logs.iterdir() for line in log.read_text().split("\n")[:-1]]
    with closing(sqlite3.connect(store)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        kept = {key for (key,) in connection.execute("SELECT id FROM observations")}
    assert len(noted) == len(set(noted)) > WRITERS, "writers wrote"
    assert set(noted) <= kept, "lost, or refused"
    assert len(kept) <= len(noted) + WRITERS * ROUNDS, "each writer may have died between its commit and its log"

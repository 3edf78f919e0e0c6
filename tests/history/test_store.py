"""The file: versions, damage, places that cannot be written. Nothing here may end the run that is noted."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from observed import observe

from brim.errors import InvalidFile
from brim.history.document import identify, write_line
from brim.history.place import find_store
from brim.history.privacy import strip_names
from brim.history.runs import Wanted, add_observation, import_observations, list_observations
from brim.history.schema import SCHEMA_VERSION


def ask(path: Path, statement: str) -> list[tuple]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


def test_what_is_noted_is_listed(store: Path) -> None:
    runs = [observe(micro, finished=f"2026-03-0{micro}T00:00:00Z") for micro in (1, 2, 4)]
    assert [add_observation(run) for run in runs] == [None, None, None]
    assert list_observations() == tuple(strip_names(run) for run in reversed(runs))
    assert list_observations(limit=1)[0].strategy.micro_batch_size == 4
    assert ask(store, "PRAGMA journal_mode") == [("wal",)]
    assert ask(store, "PRAGMA user_version") == [(SCHEMA_VERSION,)]


def test_noting_twice_is_noting_once() -> None:
    assert add_observation(observe()) is add_observation(observe()) is None
    assert len(list_observations()) == 1


def test_nothing_is_there_before_something_is_noted(store: Path) -> None:
    assert list_observations() == () and not store.parent.exists()


def test_off_is_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BRIM_HISTORY", "off")
    assert find_store() is None and add_observation(observe()) is None and list_observations() == ()
    assert list(tmp_path.iterdir()) == []


def test_the_place_is_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BRIM_HISTORY")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert find_store() is not None
    if sys.platform == "linux":
        assert find_store() == tmp_path / "brim" / "history.sqlite"


def make_version_1(path: Path, documents: dict[str, str]) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE observations (id TEXT PRIMARY KEY NOT NULL, document TEXT NOT NULL)")
        connection.executemany("INSERT INTO observations VALUES (?, ?)", documents.items())
        connection.execute("PRAGMA user_version = 1")


@pytest.mark.parametrize("first", ["read", "write"])
def test_version_1_becomes_the_current_one(store: Path, first: str) -> None:
    old = [strip_names(observe(micro)) for micro in (1, 2)]
    make_version_1(store, {identify(run): write_line(run) for run in old} | {"unreadable": "{}"})
    if first == "write":
        assert add_observation(observe(4)) is None
    found = list_observations(Wanted(gpu="rtx-4090", family="llama", trainer="trl"))
    assert {run.strategy.micro_batch_size for run in found} == ({1, 2, 4} if first == "write" else {1, 2})
    assert ask(store, "PRAGMA user_version") == [(SCHEMA_VERSION,)]
    assert ("unreadable",) in ask(store, "SELECT id FROM observations"), "what cannot be read is kept"
    assert add_observation(observe(1)) is None and len(list_observations()) == len(found)


def test_a_migration_is_whole_or_not_at_all(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_version_1(store, {})

    def fail(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE half (x)")
        raise sqlite3.OperationalError("database or disk is full")

    from brim.history import schema

    monkeypatch.setattr(schema, "_MIGRATIONS", (schema._MIGRATIONS[0], fail))
    assert "database or disk is full" in str(add_observation(observe()))
    assert ask(store, "PRAGMA user_version") == [(1,)]
    assert ask(store, "SELECT name FROM sqlite_master WHERE type = 'table'") == [("observations",)]


def test_a_newer_version_is_refused(store: Path) -> None:
    add_observation(observe())
    ask(store, "PRAGMA user_version = 99")
    with pytest.raises(InvalidFile, match="is a history of version 99, this brim knows up to"):
        list_observations()
    assert "version 99" in str(add_observation(observe(2)))


@pytest.mark.parametrize("damage", ["text", "header", "pages"])
def test_a_damaged_file_is_refused_and_left_alone(store: Path, damage: str) -> None:
    import_observations(
        [observe(micro, finished=f"2026-03-0{day}T00:00:00Z") for micro in (1, 2) for day in range(1, 9)]
    )
    raw = store.read_bytes()
    damaged = {"text": b"hello\n" * 2000, "header": b"\0" * 100 + raw[100:], "pages": raw[:4096] + b"\xff" * len(raw)}
    store.write_bytes(damaged[damage])
    for call in (list_observations, lambda: import_observations([observe(4)])):
        with pytest.raises(InvalidFile, match=r"is damaged \(.*\): move it away \(mv history.sqlite "):
            call()
    assert "is damaged" in str(add_observation(observe(4)))
    assert store.read_bytes() == damaged[damage]


def test_a_database_of_something_else_is_refused(store: Path) -> None:
    store.parent.mkdir()
    with closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    assert "is a database of something else" in str(add_observation(observe()))
    assert ask(store, "SELECT name FROM sqlite_master") == [("bookmarks",)]


@pytest.mark.parametrize("place", ["file/history.sqlite", "folder", "pipe", "/proc/nowhere/history.sqlite"])
def test_a_place_that_cannot_be_written_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("BRIM_HISTORY", str(tmp_path / place))
    warning = add_observation(observe())
    assert warning is not None and warning.startswith("this run was not noted in the history: ") and "\n" not in warning


def test_a_run_that_makes_no_sense_is_a_warning() -> None:
    assert "not noted" in str(add_observation(observe(finished="yesterday")))
    assert "not noted" in str(add_observation(observe(num_steps="three")))
    assert "not noted" in str(add_observation(observe(step_seconds=float("nan"))))
    assert "not noted" in str(add_observation(None))  # type: ignore[arg-type]
    assert list_observations() == ()


FULL = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
from observed import observe
from brim.history.runs import add_observation
runs = [observe(), observe(2)]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
print(add_observation(runs[0]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of file sizes stands in for a full disk")
@pytest.mark.parametrize("begun", [False, True])
def test_a_full_disk_is_a_warning_and_harms_nothing(store: Path, begun: bool) -> None:
    if begun:
        add_observation(observe(8))
    words = [sys.executable, "-c", FULL, os.path.dirname(__file__)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("this run was not noted in the history: "), done.stdout
    assert add_observation(observe(4)) is None
    assert {run.strategy.micro_batch_size for run in list_observations()} == ({4, 8} if begun else {4})
    assert ask(store, "PRAGMA integrity_check") == [("ok",)]


def test_a_store_on_a_read_only_medium_is_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite cannot make the index of its log there, and needs none where there is no log."""
    from brim.history import store as room

    add_observation(observe())
    connect = room._connect

    def refuse_writing(path: Path, mode: str) -> sqlite3.Connection:
        if mode.startswith("mode=rw"):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(path, mode)

    monkeypatch.setattr(room, "_connect", refuse_writing)
    assert len(list_observations()) == 1
    assert "unable to open database file" in str(add_observation(observe(2)))
    store.with_name(store.name + "-wal").write_bytes(b"x" * 100)
    with pytest.raises(InvalidFile, match="unable to open database file"):
        list_observations()

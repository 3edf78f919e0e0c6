"""The file: opened for reading or writing, brought to the current version, refused in one line where it is broken.

Write-ahead logging lets many processes read while one writes; every commit is synced to the disk, so that neither
`kill -9` nor a power cut takes back what was noted. What is deleted is overwritten.

Leaves out: homes on a network file system that several machines write to at once; SQLite's log needs one machine.
"""

from __future__ import annotations

import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from brim.errors import InvalidFile
from brim.history.schema import SCHEMA_VERSION, migrate, read_version

BUSY_SECONDS = 20.0
"""How long a writer waits for others."""
_PAUSE_SECONDS = 0.02


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open an existing store for reading; an older one is brought to the current version first.

    Raises:
        InvalidFile: damaged, of a newer brim, no store, or it cannot be read.
    """
    with _refusing(path):
        connection = _open_to_read(path)
        try:
            if _check_version(connection, path) < SCHEMA_VERSION:
                connection.close()
                connection = _open_to_write(path)
            yield connection
        finally:
            connection.close()


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a store, made if there is none, in one transaction: all of it is kept, or nothing where something fails.

    Raises:
        InvalidFile: damaged, of a newer brim, no store, or it cannot be written.
    """
    with _refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = _open_to_write(path)
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()  # what is not committed is rolled back


def scrub(path: Path) -> None:
    """Take what was deleted out of the log too; left for later while somebody else has the store open."""
    with _refusing(path):
        connection = _open_to_write(path)
        try:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            connection.close()


def _open_to_read(path: Path) -> sqlite3.Connection:
    _refuse_irregular(path)
    try:
        return _connect(path, "mode=rw")
    except sqlite3.OperationalError:
        log = path.with_name(path.name + "-wal")
        if log.exists() and log.stat().st_size:
            raise
    return _connect(path, "mode=ro&immutable=1")  # nobody may write here, so nobody does


def _open_to_write(path: Path) -> sqlite3.Connection:
    _refuse_irregular(path)
    connection = _connect(path, "mode=rwc")
    try:
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")
        if _check_version(connection, path) < SCHEMA_VERSION:
            migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """Return a connection that has read the file's head."""
    uri = f"file:{quote(str(path.absolute()))}?{mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        read_version(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Turn write-ahead logging on. SQLite does not wait for others here, so this does."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_SECONDS)


def _check_version(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of a store this brim can use; 0 of a new one."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    version = read_version(connection)  # after the tables: both come in one transaction
    if tables and ("observations" not in tables or not version):
        raise InvalidFile(path=str(path), problem="is a database of something else; set BRIM_HISTORY to another file")
    if version > SCHEMA_VERSION:
        problem = f"is a history of version {version}, this brim knows up to {SCHEMA_VERSION}: upgrade brim"
        raise InvalidFile(path=str(path), problem=problem)
    return version


def _refuse_irregular(path: Path) -> None:
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidFile(path=str(path), problem="is no regular file")


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn what SQLite and the system say into one line that says what would work."""
    try:
        yield
    except sqlite3.Error as error:
        raise InvalidFile(path=str(path), problem=_explain(error, path)) from None
    except OSError as error:
        raise InvalidFile(path=str(path), problem=f"cannot be opened: {error.strerror or error}") from None


def _explain(error: sqlite3.Error, path: Path) -> str:
    text = str(error)
    if "not a database" in text or "malformed" in text:
        return f"is damaged ({text}): move it away (mv {path.name} {path.name}.damaged) and brim begins a new history"
    if "locked" in text or "busy" in text:
        return f"is held by another program for longer than {BUSY_SECONDS:.0f} s; try again"
    if "readonly" in text or "unable to open" in text or "full" in text:
        return f"cannot be written: {text}"
    return f"cannot be used: {text}"

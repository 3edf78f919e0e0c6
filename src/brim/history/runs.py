"""The verbs of history: note a run, list runs, take in others', forget."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from brim.errors import BrimError, InvalidInput, quoted
from brim.history.place import VARIABLE, find_existing, find_store

if TYPE_CHECKING:
    from sqlite3 import Connection

    from brim.spec.observation import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which runs are meant; each that is said must hold."""

    gpu: str | None = None
    """Card, as plans name it."""
    model: str | None = None
    """Model, as history names it."""
    before: str | None = None
    """Day, ISO: runs that ended before it (UTC)."""
    family: str | None = None
    """Family of models."""
    trainer: str | None = None
    """Trainer preset."""


def add_observation(observation: Observation) -> str | None:
    """Note a measured run, without its names; noting it twice is noting it once.

    Nothing here can end the run that wanted to be noted: whatever goes wrong is returned as a warning.

    Returns:
        None if it was noted, or history is switched off; else one sentence that says why it was not.
    """
    try:
        path = find_store()
        if path is not None:
            _insert(path, [observation])
    except BrimError as error:
        return f"this run was not noted in the history: {error}"
    except Exception as error:  # a note is never worth a run
        return f"this run was not noted in the history: {type(error).__name__}: {quoted(error)}"
    return None


def list_observations(wanted: Wanted | None = None, *, limit: int | None = None) -> tuple[Observation, ...]:
    """Return measured runs, newest first; none where there is no store. Runs that this brim cannot read are left out.

    Args:
        wanted: which ones; all if None.
        limit: at most this many.

    Raises:
        InvalidFile: the store is damaged, of a newer brim, or it cannot be read.
    """
    path = find_existing()
    if path is None:
        return ()
    from brim.history.store import reading

    where, values = _select(wanted or Wanted())
    query = f"SELECT document FROM observations WHERE {where} ORDER BY finished DESC, id LIMIT ?"
    with reading(path) as connection:
        rows = connection.execute(query, (*values, -1 if limit is None else limit)).fetchall()
    return tuple(_read_documents(document for (document,) in rows))


def import_observations(observations: Iterable[Observation]) -> tuple[int, int]:
    """Take runs in, all or none, and return how many were new and how many were known.

    Raises:
        InvalidInput: history is switched off. InvalidFile: the store cannot be written.
    """
    runs = list(observations)
    try:
        new = _insert(require_store(), runs)
    except ValueError as error:
        raise InvalidInput(f"this is no measured run: {quoted(error)}") from None
    return new, len(runs) - new


def count_observations(wanted: Wanted) -> int:
    """Return how many runs are meant."""
    path = find_existing()
    if path is None:
        return 0
    from brim.history.store import reading

    where, values = _select(wanted)
    with reading(path) as connection:
        return int(connection.execute(f"SELECT COUNT(*) FROM observations WHERE {where}", values).fetchone()[0])


def forget(wanted: Wanted) -> int:
    """Delete the runs that are meant, every trace of them in the file overwritten, and return how many they were.

    Raises:
        InvalidInput: history is switched off, or no date. InvalidFile: the store cannot be written.
    """
    path = require_store()
    where, values = _select(wanted)
    if not os.path.exists(path):
        return 0
    from brim.history.store import scrub, writing

    with writing(path) as connection:
        found = connection.execute(f"DELETE FROM observations WHERE {where}", values).rowcount
    scrub(path)
    return found


def require_store() -> Path:
    """Return the file of the store, which need not exist.

    Raises:
        InvalidInput: history is switched off.
    """
    path = find_store()
    if path is None:
        raise InvalidInput(f"history is switched off: {VARIABLE}=off")
    return path


def _insert(path: Path, observations: list[Observation]) -> int:
    """Note runs in one transaction and return how many were not there yet."""
    from brim.history.document import check, identify, write_line
    from brim.history.privacy import strip_names
    from brim.history.schema import COLUMNS, list_columns
    from brim.history.store import writing

    stripped = [check(strip_names(one)) for one in observations]
    rows = [(identify(one), write_line(one), *list_columns(one)) for one in stripped]
    marks = ", ".join("?" * (2 + len(COLUMNS)))
    statement = f"INSERT OR IGNORE INTO observations (id, document, {', '.join(COLUMNS)}) VALUES ({marks})"
    with writing(path) as connection:
        before = _count(connection)
        connection.executemany(statement, rows)
        return _count(connection) - before


def _count(connection: Connection) -> int:
    return int(connection.execute("SELECT COUNT(*) FROM observations").fetchone()[0])


def _select(wanted: Wanted) -> tuple[str, tuple[str, ...]]:
    """Return the condition of a query, and its values."""
    from brim.history.privacy import OTHER, name_card
    from brim.tables.read import find_card

    pairs: list[tuple[str, str]] = []
    if wanted.gpu is not None:
        card_name = name_card(wanted.gpu)  # a name that is no card's must not stand for all unknown ones
        pairs.append(("card = ?", wanted.gpu if card_name == OTHER else card_name))
    if wanted.model is not None:
        card = find_card(wanted.model)
        pairs.append(("model = ?", card.id if card is not None else wanted.model))
    if wanted.before is not None:
        pairs.append(("finished < ?", _read_day(wanted.before)))
    if wanted.family is not None:
        pairs.append(("family = ?", wanted.family))
    if wanted.trainer is not None:
        pairs.append(("trainer = ?", wanted.trainer))
    return " AND ".join(condition for condition, _ in pairs) or "1", tuple(value for _, value in pairs)


def _read_day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise InvalidInput(f"a day is written 2026-01-31, not {quoted(text)}") from None


def _read_documents(documents: Iterable[str]) -> Iterable[Observation]:
    """Yield the runs of documents; equal jobs are one object, which the formula profiles once."""
    from brim.history.rebuild import rebuild
    from brim.spec.observation import Observation
    from brim.spec.workload import Workload

    jobs: dict[str, Workload] = {}
    for text in documents:
        try:
            document = json.loads(text)
            key = json.dumps(document["workload"])
            if key not in jobs:
                jobs[key] = rebuild(Workload, document["workload"])
            found = rebuild(Observation, document | {"workload": jobs[key]})
        except (ValueError, KeyError, TypeError):
            continue
        yield found

"""The tables of the store, and how each version becomes the next. A version that was written once stays readable."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from brim.cost.calibration import read_torch
from brim.history.privacy import find_card_name
from brim.history.rebuild import rebuild
from brim.spec.observation import Observation

if TYPE_CHECKING:
    from sqlite3 import Connection

COLUMNS = ("finished", "card", "model", "family", "trainer", "torch")
"""What runs are looked for by, beside their document."""


def list_columns(observation: Observation) -> tuple[str, ...]:
    """Return the values of `COLUMNS` for a run without names."""
    model, recipe = observation.workload.model, observation.workload.recipe
    return (
        observation.finished, find_card_name(observation), model.name, model.model_type, recipe.engine.name,
        read_torch(observation.versions),
    )  # fmt: skip


def _create(connection: Connection) -> None:
    connection.execute("CREATE TABLE observations (id TEXT PRIMARY KEY NOT NULL, document TEXT NOT NULL)")


def _add_columns(connection: Connection) -> None:
    """Version 2: a plan asks for the runs of one card and family, and should not read all documents for it."""
    for name in COLUMNS:
        connection.execute(f"ALTER TABLE observations ADD COLUMN {name} TEXT NOT NULL DEFAULT ''")
    sets = ", ".join(f"{name} = ?" for name in COLUMNS)
    for key, document in connection.execute("SELECT id, document FROM observations").fetchall():
        try:
            columns = list_columns(rebuild(Observation, json.loads(document)))
        except ValueError:  # it stays, and is found by nothing
            continue
        connection.execute(f"UPDATE observations SET {sets} WHERE id = ?", (*columns, key))
    connection.execute("CREATE INDEX observations_by_card ON observations (card, family, trainer, finished)")


_MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_create, _add_columns)
SCHEMA_VERSION = len(_MIGRATIONS)


def read_version(connection: Connection) -> int:
    """Return the version of the tables; 0 in a new file."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: Connection) -> None:
    """Bring the tables to the current version: all steps or none, however many processes try at once.

    Args:
        connection: a writable one in autocommit mode, whose version is not newer.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = read_version(connection)  # another process may have been first
        for step in _MIGRATIONS[version:]:
            step(connection)
        connection.execute(f"PRAGMA user_version = {max(version, SCHEMA_VERSION)}")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")

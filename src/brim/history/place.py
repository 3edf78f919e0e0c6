"""Where the store is; nothing is read before somebody asks."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "BRIM_HISTORY"
_OFF = ("off", "0", "no", "false")


def find_store() -> Path | None:
    """Return the file of the store, which need not exist; None where BRIM_HISTORY=off.

    BRIM_HISTORY names another file; else it is `brim/history.sqlite` in the user's data folder.

    Raises:
        RuntimeError: the user has no home.
    """
    said = os.environ.get(VARIABLE, "").strip()
    if said.lower() in _OFF:
        return None
    if said:
        return Path(said).expanduser()
    from platformdirs import user_data_dir

    return Path(user_data_dir("brim", appauthor=False)) / "history.sqlite"


def find_existing() -> Path | None:
    """Return the file of the store; None where history is switched off or nothing was noted yet.

    Raises:
        RuntimeError: the user has no home.
    """
    path = find_store()
    return path if path is not None and os.path.exists(path) else None

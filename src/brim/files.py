"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from brim.errors import InvalidFile


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all: a temporary file beside it, then one rename.

    A link is followed; a device or pipe is written to as it is, since a rename would replace it.

    Raises:
        InvalidFile: the folder is missing or cannot be written to.
    """
    try:
        target = Path(path).resolve()
        if target.is_dir():
            raise IsADirectoryError(21, "is a folder")
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
        else:
            _replace_file(target, text)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidFile(path=os.fspath(path), problem=_what_failed(error, "cannot be written")) from None


def _replace_file(target: Path, text: str) -> None:
    import tempfile  # 10 ms that a plan which is only printed need not pay

    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name[:40]}.", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
        os.chmod(temporary, _mode_of_new_files())
        os.replace(temporary, target)
        temporary = None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _mode_of_new_files() -> int:
    """Return the permissions a plain `open` would have given (temporary files are private)."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _what_failed(error: Exception, verb: str) -> str:
    reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text or no path"
    return f"{verb}: {reason or type(error).__name__}"

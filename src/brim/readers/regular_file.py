"""Opening a file that nobody vouches for: never a pipe, a device or a folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from brim.errors import InvalidFile

# Opening must neither wait for the writer of a FIFO nor take over a terminal.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_CLOEXEC", 0)


@contextmanager
def open_regular(path: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file, or a link to one, for reading bytes; gives the file and its size in bytes.

    Raises:
        InvalidFile: missing, no regular file, or it cannot be read, now or while it is open.
    """
    try:
        descriptor, status = _open(path)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise InvalidFile(path=path, problem="is no regular file")
        with open(descriptor, "rb") as file:
            yield file, status.st_size
    except OSError as error:
        raise InvalidFile(path=path, problem=f"cannot be read: {error.strerror or error}") from None


def read_whole(path: str, most_bytes: int, advice: str) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        InvalidFile: as `open_regular`, or larger than `most_bytes`, with what to do about that.
    """
    with open_regular(path) as (file, _):
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise InvalidFile(path=path, problem=f"is larger than {most_bytes:,} bytes; {advice}")
    return raw


def _open(path: str) -> tuple[int, os.stat_result]:
    try:
        descriptor = os.open(path, _OPEN_FLAGS | getattr(os, "O_BINARY", 0))
    except ValueError:
        raise InvalidFile(path=path, problem="is no file name") from None
    return descriptor, os.fstat(descriptor)

"""How many rows a dataset file holds, counted as it streams by."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, NoReturn

from brim.errors import InvalidFile, quoted
from brim.readers.regular_file import open_regular

LARGEST_JSON_BYTES = 200_000_000
"""A list of objects must be parsed as a whole; JSONL need not, bytes."""
LONGEST_LINE_BYTES = 2**26
"""No row is that long; a file without line ends must not be loaded, bytes."""
PARSED_BYTES = 2**26
"""How much of a JSONL file is parsed (half a second); of later lines only the ends are looked at, bytes."""
_FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_PATH_STARTS = ("/", "./", "../", "~/")


def read_dataset(name: str, *, packing: bool) -> tuple[int | None, str]:
    """Return the sequences of one epoch, None if unknown, and one sentence about the file, `` for a hub id.

    Args:
        name: file, folder or hub id.
        packing: whether sequences are filled with several rows; how many there are then depends on their lengths.

    Raises:
        InvalidFile: the file is missing or broken.
    """
    path = find_file(name)
    if path is None:
        return None, ""
    rows, shown = count_rows(path), quoted(name)[1:-1]
    if rows is None:
        return None, f"rows of {shown} not counted: {_why_unknown(path)}; say --dataset-size"
    counted = f"{rows:,} row{'s' if rows != 1 else ''} in {shown}"
    if packing:
        return None, f"{counted}; packed rows are no sequences, so sequences per epoch are unknown"
    return rows, counted


def find_file(name: str) -> str | None:
    """Return the path of the file or folder that a dataset's name means, None if it is a hub id.

    Raises:
        InvalidFile: it looks like a path, and nothing is there.
    """
    path = os.path.expanduser(name) if name.startswith("~/") else name
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        if os.path.lexists(path) or name.startswith(_PATH_STARTS) or _suffix(name) in _FILE_SUFFIXES:
            reason = error.strerror if isinstance(error, OSError) else "no file name"
            raise InvalidFile(path=name, problem=f"dataset cannot be read: {reason}") from None
        return None
    return path


def count_rows(path: str) -> int | None:
    """Return the rows of a JSONL, JSON, CSV, text or Parquet file, None if its kind cannot be counted here.

    Raises:
        InvalidFile: missing, no regular file, without rows, or broken; the text names the line.
    """
    if os.path.isdir(path):
        return None
    if _suffix(path) == ".parquet":
        rows = _count_parquet(path)
    else:
        with open_regular(path) as (file, size_bytes):
            count = _COUNTERS.get(_suffix(path))
            rows = count(file, path, size_bytes) if count is not None else None
    if rows == 0:
        raise InvalidFile(path=path, problem="has no rows")
    return rows


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _why_unknown(path: str) -> str:
    if os.path.isdir(path):
        return "it is a folder"
    return "that needs pyarrow" if _suffix(path) == ".parquet" else f"only {', '.join(_FILE_SUFFIXES)} are"


def _refuse(path: str, line: int, problem: str) -> NoReturn:
    raise InvalidFile(path=path, problem=f"line {line:,} {problem}")


def _lines(file: BinaryIO, path: str) -> Iterator[bytes]:
    number = 0
    while line := file.readline(LONGEST_LINE_BYTES + 1):
        number += 1
        if len(line) > LONGEST_LINE_BYTES:
            _refuse(path, number, f"is longer than {LONGEST_LINE_BYTES:,} bytes; no row is")
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _count_jsonl(file: BinaryIO, path: str, _: int = 0) -> int:
    rows = seen_bytes = 0
    for number, line in enumerate(_lines(file, path), 1):
        text = line.strip()
        if not text:
            continue
        if not (text.startswith(b"{") and text.endswith(b"}")):
            _refuse(path, number, "is no JSON object")
        if seen_bytes < PARSED_BYTES:
            _check_object(text, path, number)
        seen_bytes += len(line)
        rows += 1
    return rows


def _check_object(text: bytes, path: str, number: int) -> None:
    try:
        json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        _refuse(path, number, "is not UTF-8 text")
    except json.JSONDecodeError as error:
        _refuse(path, number, f"is broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError):
        _refuse(path, number, "is broken JSON: a number too long, or nested too deeply")


def _count_json(file: BinaryIO, path: str, size_bytes: int) -> int:
    """Return the rows of a list of objects; of JSONL under the name `.json`, which `datasets` reads too."""
    start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    file.seek(0)
    if start == b"{":
        return _count_jsonl(file, path)
    if size_bytes > LARGEST_JSON_BYTES:
        problem = f"is larger than {LARGEST_JSON_BYTES:,} bytes; write it as JSONL, one object a line"
        raise InvalidFile(path=path, problem=problem)
    try:
        rows = json.loads(file.read(LARGEST_JSON_BYTES + 1).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InvalidFile(path=path, problem="is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        _refuse(path, error.lineno, f"is broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError):
        raise InvalidFile(path=path, problem="is broken JSON: a number too long, or nested too deeply") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InvalidFile(path=path, problem="must hold a list of objects")
    return len(rows)


def _count_csv(file: BinaryIO, path: str, _: int) -> int:
    """Return the records after the header; a record may span lines inside quotes."""
    longest = csv.field_size_limit(LONGEST_LINE_BYTES)  # the module's own limit refuses long texts
    reader = csv.reader(line.decode("utf-8") for line in _lines(file, path))
    try:
        return max(0, sum(1 for record in reader if record) - 1)
    except UnicodeDecodeError:
        _refuse(path, reader.line_num + 1, "is not UTF-8 text")
    except csv.Error as error:
        _refuse(path, reader.line_num, f"is broken CSV: {error}")
    finally:
        csv.field_size_limit(longest)


def _count_text(file: BinaryIO, path: str, _: int) -> int:
    return sum(1 for _line in _lines(file, path))


def _count_parquet(path: str) -> int | None:
    with open_regular(path) as (file, _):
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            return None
        try:
            return int(ParquetFile(file).metadata.num_rows)
        except ValueError as error:
            first = quoted((str(error).splitlines() or [""])[0])[1:-1]
            raise InvalidFile(path=path, problem=f"is broken Parquet: {first}") from None


_COUNTERS: dict[str, Callable[[BinaryIO, str, int], int]] = {
    ".jsonl": _count_jsonl, ".json": _count_json, ".csv": _count_csv, ".txt": _count_text,
}  # fmt: skip

"""Rows of dataset files: counted as they stream by, broken ones refused with the line."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from brim.errors import InvalidFile
from brim.readers import dataset
from brim.readers.dataset import count_rows, find_file, read_dataset


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(("name", "text", "rows"), [
    ("a.jsonl", '{"a": 1}\n\n{"a": "x"}\n', 2),
    ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}', 2),
    ("A.JSONL", '{"a": 1}\n', 1),
    ("a.json", '[{"a": 1},\n {"a": 2}]', 2),
    ("a.json", '{"a": 1}\n{"a": 2}\n{"a": 3}\n', 3),
    ("a.csv", 'a,b\n1,"two\nlines"\n2,z\n\n', 2),
    ("a.csv", "a\n" + "x" * 200_000 + "\n", 1),
    ("a.txt", "one\ntwo\n", 2),
    ("a.tar", "anything", None),
])  # fmt: skip
def test_rows(tmp_path: Path, name: str, text: str | bytes, rows: int | None) -> None:
    limit = csv.field_size_limit()
    assert count_rows(write(tmp_path, name, text)) == rows
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(("name", "text", "problem"), [
    ("a.jsonl", '{"a": 1}\n{"a": }\n', "line 2 is broken JSON: Expecting value at column 7"),
    ("a.jsonl", '{"a": 1}\n\n{"a": ', "line 3 is no JSON object"),
    ("a.jsonl", "[1]\n", "line 1 is no JSON object"),
    ("a.jsonl", b'{"a": "\xff"}\n', "line 1 is not UTF-8 text"),
    ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "line 1 is broken JSON"),
    ("a.jsonl", '{"a":' * 100_000 + "}", "line 1 is broken JSON"),
    ("a.jsonl", "", "has no rows"),
    ("a.json", "[1, 2]", "must hold a list of objects"),
    ("a.json", '[{"a": 1},\n{]', "line 2 is broken JSON"),
    ("a.json", "[" * 100_000, "is broken JSON"),
    ("a.json", b"\xff", "is not UTF-8 text"),
    ("a.csv", "a,b\n", "has no rows"),
    ("a.csv", b"a\n1\n\xff\n", "line 3 is not UTF-8 text"),
])  # fmt: skip
def test_broken_files_are_one_line(tmp_path: Path, name: str, text: str | bytes, problem: str) -> None:
    with pytest.raises(InvalidFile) as refused:
        count_rows(write(tmp_path, name, text))
    assert problem in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_too_large_to_load_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "LARGEST_JSON_BYTES", 20)
    monkeypatch.setattr(dataset, "LONGEST_LINE_BYTES", 40)
    with pytest.raises(InvalidFile, match="is larger than 20 bytes; write it as JSONL, one object a line"):
        count_rows(write(tmp_path, "a.json", json.dumps([{"a": 1}] * 5)))
    for name in ("a.jsonl", "a.csv", "a.txt"):
        with pytest.raises(InvalidFile, match="line 2 is longer than 40 bytes"):
            count_rows(write(tmp_path, name, '{"a": 1}\n{"a": "' + "x" * 100 + '"}'))
    with pytest.raises(InvalidFile, match=r"is broken CSV: field larger than field limit"):
        count_rows(write(tmp_path, "b.csv", 'a\n"' + "x\n" * 100))


def test_beyond_what_is_parsed_only_the_ends_of_lines_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "PARSED_BYTES", 5)
    assert count_rows(write(tmp_path, "a.jsonl", '{"a": 1}\n{broken}\n')) == 2
    with pytest.raises(InvalidFile, match="line 2 is no JSON object"):
        count_rows(write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": \n'))


def test_memory_is_bounded(tmp_path: Path) -> None:
    import tracemalloc

    path = write(tmp_path, "a.jsonl", '{"text": "some words of a row"}\n' * 300_000)
    tracemalloc.start()
    try:
        assert count_rows(path) == 300_000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_parquet_is_counted_from_its_metadata(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"a": [1, 2, 3]}), path)
    assert count_rows(path) == 3
    with pytest.raises(InvalidFile, match="is broken Parquet"):
        count_rows(write(tmp_path, "b.parquet", "no"))


def test_parquet_without_pyarrow_stays_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    path = write(tmp_path, "b.parquet", "no")
    assert read_dataset(path, packing=False)[0] is None
    assert "that needs pyarrow; say --dataset-size" in read_dataset(path, packing=False)[1]


def test_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "d.jsonl", '{"a": 1}\n' * 5000)
    assert read_dataset("d.jsonl", packing=False) == (5000, "5,000 rows in d.jsonl")
    rows, sentence = read_dataset("d.jsonl", packing=True)
    assert rows is None and sentence.startswith("5,000 rows in d.jsonl; packed rows are no sequences")
    assert read_dataset("org/name", packing=False) == (None, "")
    (tmp_path / "folder").mkdir()
    assert read_dataset("folder", packing=False) == (
        None, "rows of folder not counted: it is a folder; say --dataset-size"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["no.jsonl", "no.csv", "/no/such", "./no", "../no", "~/no-such-file", "x/no.PARQUET"])
def test_a_missing_file_is_refused(name: str) -> None:
    with pytest.raises(InvalidFile, match="dataset cannot be read: No such file or directory"):
        find_file(name)


@pytest.mark.parametrize("name", ["alpaca", "org/name", "データ", "a\x00b", "x" * 5000, "\ud800"])
def test_a_name_that_is_no_path_is_a_hub_id(name: str) -> None:
    assert find_file(name) is None


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InvalidFile, match="is no regular file"):
        count_rows(str(tmp_path / "pipe.jsonl"))

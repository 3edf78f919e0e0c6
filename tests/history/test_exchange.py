"""Runs as lines of JSON: out, in again, and never half."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from observed import observe

from brim import api
from brim.errors import InvalidFile, InvalidInput
from brim.history.document import LONGEST_LINE, SCHEMA_VERSION, write_line
from brim.history.privacy import strip_names
from brim.history.runs import import_observations, list_observations


def test_out_and_in_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [observe(micro, finished=f"2026-03-0{micro}T00:00:00Z") for micro in (1, 2, 4)]
    import_observations(runs)
    path, before = tmp_path / "runs.jsonl", list_observations()
    assert api.export_history(path) == 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["schema_version"] for line in lines] == [SCHEMA_VERSION] * 3
    assert api.import_history(path) == (0, 3), "known runs are not doubled"
    monkeypatch.setenv("BRIM_HISTORY", str(tmp_path / "other.sqlite"))
    assert api.import_history(path) == (3, 0) and list_observations() == before
    assert api.import_history(path) == (0, 3) and list_observations() == before
    again = tmp_path / "again.jsonl"
    api.export_history(again)
    assert again.read_bytes() == path.read_bytes()


def test_two_machines_come_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_observations([observe(1), observe(2)])
    api.export_history(tmp_path / "mine.jsonl")
    monkeypatch.setenv("BRIM_HISTORY", str(tmp_path / "other.sqlite"))
    import_observations([observe(2), observe(4)])
    assert api.import_history(tmp_path / "mine.jsonl") == (1, 1)
    assert sorted(run.strategy.micro_batch_size for run in list_observations()) == [1, 2, 4]


def test_names_in_a_file_stay_outside(tmp_path: Path, store: Path) -> None:
    document = json.loads(write_line(observe()))
    document["workload"]["data"]["name"] = "acme/payroll"
    document["workload"]["model"]["name"] = "/home/alice/model"
    (tmp_path / "runs.jsonl").write_text(json.dumps(document))
    assert api.import_history(tmp_path / "runs.jsonl") == (1, 0)
    raw = b"".join(path.read_bytes() for path in store.parent.iterdir())
    assert b"payroll" not in raw and b"alice" not in raw


def change(path: str, value: Any) -> bytes:
    document = json.loads(write_line(strip_names(observe())))
    inside, *keys = document, *path.split(".")
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    return json.dumps(document).encode()


BROKEN = {
    "no json": (b"{", "is no JSON: Expecting property name"),
    "a list": (b"[1]", "is no run: not a JSON object"),
    "no version": (b"{}", "is no run: it has no schema_version"),
    "newer": (change("schema_version", 2), "has schema version 2, this brim reads up to 1"),
    "true version": (change("schema_version", True), "it has no schema_version"),
    "wrong type": (change("num_steps", "3"), "num_steps: Input should be a valid integer"),
    "unknown key": (change("workload.secret", 1), "workload.secret: Unexpected keyword argument"),
    "unknown kind": (change("kind", "guess"), "kind: Input should be 'trial' or 'watch'"),
    "nan": (change("step_seconds", float("nan")), "NaN is no number"),
    "infinite": (change("step_seconds", float("inf")), "Infinity is no number"),
    "huge": (change("peak_allocated_bytes", 10**30), "a number below zero or beyond 2"),
    "more than digits": (b'{"schema_version": 1' + b"0" * 5000 + b"}", "line 3: "),
    "negative": (change("peak_allocated_bytes", -1), "a number below zero"),
    "nothing": (change("strategy.micro_batch_size", 0), "micro_batch_size must be at least 1, not 0"),
    "no day": (change("finished", "yesterday"), "finished: 'yesterday' is no time"),
    "control": (change("device", "x\x1b[31m"), "holds unprintable text"),
    "bytes": (b"\xff\xfe", "not UTF-8 text"),
    "deep": (b"[" * 100_000, "line 3: "),
    "long": (b'{"a": "' + b"x" * LONGEST_LINE + b'"}', "is longer than 1,000,000 characters"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named_and_nothing_is_taken(tmp_path: Path, case: str) -> None:
    line, said = BROKEN[case]
    path = tmp_path / "runs.jsonl"
    path.write_bytes(write_line(observe(1)).encode() + b"\n\n" + line + b"\n" + write_line(observe(2)).encode())
    with pytest.raises(InvalidFile) as refused:
        api.import_history(path)
    text = str(refused.value)
    assert "line 3: " in text and said in text and "\n" not in text and text.isprintable() and len(text) < 400
    assert text.endswith("nothing was imported")
    assert list_observations() == ()


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path, Path("/dev/zero")):
        with pytest.raises(InvalidFile):
            api.import_history(path)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert api.import_history(tmp_path / "empty.jsonl") == (0, 0)


def test_switched_off_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIM_HISTORY", "off")
    (tmp_path / "runs.jsonl").write_text(write_line(observe()))
    with pytest.raises(InvalidInput, match="history is switched off: BRIM_HISTORY=off"):
        api.import_history(tmp_path / "runs.jsonl")
    assert api.export_history(tmp_path / "out.jsonl") == 0


def test_a_field_that_is_added_moves_no_key() -> None:
    """The key leaves defaults out, so an older brim's export stays the same run under a newer one."""
    from dataclasses import dataclass, fields

    from brim.history.document import identify
    from brim.spec.observation import Observation

    @dataclass(frozen=True, kw_only=True)
    class Later(Observation):
        spilled_bytes: int = 0

    run = strip_names(observe())
    later = Later(**{field.name: getattr(run, field.name) for field in fields(run)})
    assert identify(later) == identify(run)

"""`brim show brim-run.json`."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from brim.cli.app import main
from brim.runtime.run_record import RUN_FILE, Expected, Measured, RunRecord, write_run
from brim.runtime.sight import Verdict
from brim.spec.observation import Prediction

RECORD = RunRecord(
    state="died", problem="out of memory", verdicts=(Verdict(code="slow", severity="warning", text="slow", step=2),),
    expected=Expected(
        prediction=Prediction(source="formula", peak_allocated_bytes=9, peak_reserved_bytes=10, device_bytes=11),
        longest_tokens=8, budget_bytes=12, capacity_bytes=13, as_run_seconds=2.0, tokens_per_second=3.0,
    ),
    measured=Measured(
        num_steps=7, num_ranks=2, device="cpu", capacity_bytes=13, peak_allocated_bytes=9, peak_reserved_bytes=10,
        device_bytes=11, longest_tokens=8, coming_tokens=9, step_seconds=2.0, tokens_per_second=3.0,
        padding_fraction=0.5, aside_bytes=3,
    ),
)  # fmt: skip


def write(folder: Path) -> Path:
    write_run(folder, RunRecord(state="ended", measured=Measured(num_steps=7, device="cpu", step_seconds=2.0)))
    return folder / RUN_FILE


def test_a_run_is_shown(tmp_path: Path, capsys: Any) -> None:
    assert main(["show", str(write(tmp_path))]) == 0
    assert capsys.readouterr().out.startswith("Ended after 7 optimizer steps on cpu")


def test_a_run_as_json(tmp_path: Path, capsys: Any) -> None:
    assert main(["show", str(write(tmp_path)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"]["num_steps"] == 7


def test_a_folder_with_a_run_and_a_run_by_another_name(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path)
    assert main(["show", str(tmp_path)]) == 0
    path.rename(tmp_path / "kept.json")
    assert main(["show", str(tmp_path / "kept.json")]) == 0
    assert capsys.readouterr().out.count("Ended after 7 optimizer steps on cpu") == 2


WRONG = ("", "x", "\x1b[31m", -1, 0, 1e300, 10**30, 0.5, True, None, [], {}, [1], {"a": 1})


def test_whatever_stands_in_a_run_it_is_shown_or_refused_in_one_line(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / RUN_FILE
    write_run(tmp_path, RECORD)
    whole = json.loads(path.read_text(encoding="utf-8"))
    places = [(key,) for key in whole] + [("measured", key) for key in whole["measured"]]
    places += [("expected", key) for key in whole["expected"]] + [("verdicts", key) for key in whole["verdicts"][0]]
    for place in places:
        for wrong in WRONG:
            document = deepcopy(whole)
            inner = document if len(place) == 1 else document[place[0]]
            (inner[0] if isinstance(inner, list) else inner)[place[-1]] = wrong
            path.write_text(json.dumps(document), encoding="utf-8")
            code, said = main(["show", str(path)]), capsys.readouterr()
            assert code in (0, 2), (place, wrong, said.err)
            assert code == 0 or len(said.err.splitlines()) == 1
    path.write_bytes(json.dumps(whole).encode()[:-40])
    assert main(["show", str(path)]) == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_broken_run_is_refused(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace('"ended"', '"walking"'), encoding="utf-8")
    assert main(["show", str(path)]) == 2
    assert "state" in capsys.readouterr().err

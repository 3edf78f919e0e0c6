"""`brim show brim-run.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from brim.cli.app import main
from brim.runtime.run_record import RUN_FILE, Measured, RunRecord, write_run


def write(folder: Path) -> Path:
    write_run(folder, RunRecord(state="ended", measured=Measured(num_steps=7, device="cpu", step_seconds=2.0)))
    return folder / RUN_FILE


def test_a_run_is_shown(tmp_path: Path, capsys: Any) -> None:
    assert main(["show", str(write(tmp_path))]) == 0
    assert capsys.readouterr().out.startswith("Ended after 7 optimizer steps on cpu")


def test_a_run_as_json(tmp_path: Path, capsys: Any) -> None:
    assert main(["show", str(write(tmp_path)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"]["num_steps"] == 7


def test_a_broken_run_is_refused(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace('"ended"', '"walking"'), encoding="utf-8")
    assert main(["show", str(path)]) == 2
    assert "state" in capsys.readouterr().err

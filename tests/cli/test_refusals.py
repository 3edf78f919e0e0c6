"""Every refusal is one line, with the right exit code, and leaves nothing behind."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import brim as package
from brim import api
from brim.cli.app import main
from brim.errors import BrimError, NotExact, ProbeFailed, Unreachable

Run = Callable[..., Any]


@pytest.mark.parametrize(("words", "said"), [
    (["plan"], "name one model"),
    (["plan", "8B", "--model", "7B"], "name one model"),
    (["plam", "8B"], "did you mean plan?"),
    (["plan", "8B", "--sequence-len", "4"], "no such option: --sequence-len"),
    (["plan", "8B", "9B"], "unexpected argument '9B'"),
    (["plan", "8B", "--gpu"], "requires an argument"),
    (["plan", "8B", "--seq-len", "many"], "--seq-len must be a whole number, not 'many'"),
    (["plan", "8B", "--seq-len", "9" * 5000], "--seq-len must be a whole number"),
    (["plan", "8B", "--epochs", "x"], "--epochs must be a number"),
    (["plan", "8B", "--epochs", "nan", "--gpu", "t4"], "epochs"),
    (["plan", "8B", "--gpu", "rtx-4099"], "rtx-4090"),
    (["plan", "8B", "--gpu", "rtx-4090", "--effective-batch-size", "0"], "effective_batch_size"),
    (["plan", "8B", "--gpu", "rtx-4090", "--task", "chatt"], "did you mean chat?"),
    (["plan", "8B", "--gpu", "rtx-4090:3", "--effective-batch-size", "32"], "nearest: "),
    (["plan", "8B", "--gpu", "rtx-4090", "--method", "qlora", "--export", "trll"], "did you mean trl?"),
    (["plan", "/no/such/folder", "--gpu", "t4"], "/no/such/folder"),
    (["plan", "8B", "--gpu", "0GiB"], "the size of the GPU is zero: '0GiB'; write for example 24GiB"),
    (["plan", "17B", "--gpu", "t4"], "no card of 17B; nearest 16B and 20B"),
    (["plan", "8B", "--gpu", "rtx-4090", "--dataset", "no.jsonl"], "'no.jsonl': dataset cannot be read"),
    (["plan", "8B", "--gpu", "rtx-4090", "--for-version", "0.20"], "name the target with --export"),
    (["plan", "8B", "--gpu", "rtx-4090", "--export", "trl", "--for-version", "x"], "unknown trl version 'x'"),
    (["estimate", "8B", "--gpu", "t4", "--by", "formula,guess"], "guess"),
    (["verify", "train.py:make", "--ranks", "2", "--sharding", "fsdp2"], "says fsdp=True in its arguments"),
    (["estimate", "8B", "--gpu", "t4", "--by", ""], "answerer"),
    (["show", "no-plan.json"], "no-plan.json"),
    (["show", "."], "'.'"),
    (["show"], "missing PLAN"),
    (["export", "no-plan.json", "trl"], "no-plan.json"),
    (["export", "no-plan.json"], "missing TARGET"),
    (["schema", "plann"], "did you mean plan?"),
    (["gpus", "nothing"], "unknown GPU 'nothing'"),
])  # fmt: skip
def test_bad_input_is_one_line_and_code_2(brim: Run, words: list[str], said: str) -> None:
    done = brim(*words)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert said in done.err
    assert len(done.err) < 400


@pytest.mark.parametrize("words", [["show", "pipe"], ["export", "pipe", "trl"], ["plan", "8B", "--dataset", "pipe"]])
def test_a_pipe_is_refused_not_waited_for(
    brim: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    done = brim(*words, *(["--gpu", "rtx-4090"] if words[0] == "plan" else []))
    assert (done.code, done.out, done.err) == (2, "", "error: 'pipe': is no regular file\n")


def test_what_does_not_fit_says_what_would(brim: Run) -> None:
    done = brim("plan", "8B", "--method", "full", "--gpu", "rtx-4090")
    assert done.code == 3
    assert done.out.startswith("Does not fit: ") and "--method" in done.out
    assert done.err.startswith("error: ") and done.err.count("\n") == 1


def test_errors_as_json(brim: Run) -> None:
    unfit = brim("plan", "8B", "--method", "full", "--gpu", "rtx-4090", "--json")
    error = unfit.json["error"]
    assert unfit.code == 3 and unfit.err == ""
    assert error["type"] == "DoesNotFit" and error["gap_bytes"] > 0
    assert all(row["change"] for row in error["relaxations"])
    unknown = brim("plan", "8B", "--gpu", "rtx-4099", "--json")
    assert unknown.code == 2 and unknown.json["error"]["close_matches"]
    usage = brim("plan", "8B", "--no-such-flag", "--json")
    assert usage.code == 2 and usage.json["error"]["type"] == "InvalidInput"


@pytest.mark.parametrize(("error", "code"), [
    (NotExact("a"), 4), (ProbeFailed("b"), 5), (Unreachable("c"), 6), (BrimError("d"), 1), (KeyboardInterrupt(), 130),
])  # fmt: skip
def test_exit_codes(brim: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    raise_instead(monkeypatch, error)
    assert brim("plan", "8B").code == code


def raise_instead(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def plan(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(api, "plan", plan)


def test_our_bug_is_one_line_and_asks_for_a_report(brim: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    raise_instead(monkeypatch, ZeroDivisionError("by\nzero"))
    done = brim("plan", "8B")
    assert done.code == 1 and done.err.count("\n") == 1
    assert done.err.startswith("error: internal: ZeroDivisionError: by zero; please report it")
    assert brim("plan", "8B", "--json").json["error"]["type"] == "Internal"
    monkeypatch.setenv("BRIM_DEBUG", "1")
    assert "Traceback" in brim("plan", "8B").err


@pytest.mark.parametrize("out", ["missing/plan.json", ".", "plan.json/plan.json", "x" * 5000, "a\x00b"])
def test_an_output_that_cannot_be_written(
    brim: Run, job: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    done = brim("plan", *job, "--out", out.replace("plan.json/", "file/"))
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_an_export_folder_that_cannot_be_made(brim: Run, job: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    done = brim("plan", *job, "--export", "trl", "--export-dir", str(tmp_path / "file"))
    assert done.code == 2 and done.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_device_is_refused_and_stays_a_device(brim: Run, job: tuple[str, ...], tmp_path: Path) -> None:
    """A copy of /dev/full: renaming a file onto the real one would replace it for the whole machine."""
    node = tmp_path / "full"
    try:
        os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 7))
        node.write_text("x")
    except PermissionError:
        pytest.skip("no devices can be made here")
    except OSError:
        pass
    done = brim("plan", *job, "--out", str(node))
    assert stat.S_ISCHR(node.lstat().st_mode)
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1


@pytest.mark.parametrize(("words", "code", "said"), [
    (["gpus"], 2, "'standard output': No space left on device\n"),
    (["--version"], 2, "'standard output': No space left on device\n"),
    (["plan", "8B", "--method", "full", "--gpu", "t4"], 3, "does not fit"),
])  # fmt: skip
def test_a_full_standard_output_is_refused(words: list[str], code: int, said: str) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = run_process(*words, stdout=full)
    assert done.returncode == code
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = run_process("models", stdout=closed)
    assert (done.returncode, done.stderr) == (0, "")


def run_process(*words: str, stdout: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "brim", *words], stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment,
        timeout=60,
    )  # fmt: skip


def test_output_that_cannot_be_shown_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["plan", "8B", "--method", "qlora", "--gpu", "rtx-4090", "--dataset", "データ"]) == 0
    assert raw.getvalue().isascii()

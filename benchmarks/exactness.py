"""Which heads of transformers accumulate exactly, as installed and under brim: the table the field lacks.

Each class is built small and trained for one epoch under each loop and each way to split a window of 8 sequences; the
gradient of every optimizer step is compared with the sequences run alone. Rows go to the table as they come: a run that
was cut off goes on where it stopped. Run: make exactness
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import transformers

import brim
from brim.checks.accumulation import verify_accumulation
from brim.checks.diagnose import identify_cause
from brim.checks.report import AccumulationReport
from brim.checks.subjects import build_subject
from brim.errors import BrimError, InseparableLoss
from brim.runtime.forms import find_exact_form
from exactness_cases import CASES, LOOPS, OLD_CASES, Case
from report_exactness import write_page

TABLE = Path(brim.__file__).parent / "tables" / "exactness.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "exactness.md"
RANKS = Path(__file__).parent / "results" / "exactness_ranks.jsonl"
_SECONDS = 90
_PADDED = 1e-5
"""Difference of a padded batch to its sequences alone above which a class is measured with sequences of one length."""

Row = dict[str, Any]
Key = tuple[str, str, str]


def list_versions() -> Row:
    """Return the releases that a row holds for."""
    found = {}
    for package in ("transformers", "trl", "accelerate", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def has_loop(loop: str) -> bool:
    """Return whether the checks can run a loop here."""
    return loop != "lightning" or find_spec("lightning") is not None


def measure_row(case: Case, loop: str, source: str) -> Row:
    """Return a class under one loop, as installed and under brim."""
    row: Row = {
        **list_versions(), "class": case.name, "group": case.group, "loop": loop, "rows": "uneven",
        "retrieved": date.today().isoformat(), "source": source,
    }  # fmt: skip
    exactly = find_exact_form(loop)
    stock, brim_side = _try(case, loop, None), _try(case, loop, exactly)
    padded = max(side.get("padding_error") or 0.0 for side in (stock, brim_side))
    if padded > _PADDED:
        row["rows"], row["padded_error"] = "equal", _short(padded)
        stock = _try(case, loop, None, equal_lengths=True)
        brim_side = _try(case, loop, exactly, equal_lengths=True)
    row |= {"installed": stock, "brim": {"with": exactly.__name__, **brim_side}}
    return row


def _try(case: Case, loop: str, exactly: Any, *, equal_lengths: bool = False) -> Row:
    """Return what one run says, or why there is none."""
    kind = getattr(transformers, case.architecture, None)
    if kind is None:
        return {"failed": f"no such class in transformers {transformers.__version__}"}
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(_SECONDS)
    try:
        config = merge(kind.config_class().to_dict(), case.numbers or {})
        subject = build_subject(config, case.architecture, loop, exactly=exactly, equal_lengths=equal_lengths)
        return describe(verify_accumulation(subject))
    except InseparableLoss as error:
        return {"refused": _line(error)}
    except BrimError as error:
        return {"failed": _line(error)}
    except Exception as error:  # a model's own code, on inputs made up here
        return {"failed": f"{type(error).__name__}: {_line(error)}"}
    finally:
        signal.alarm(0)


def describe(report: AccumulationReport) -> Row:
    """Return what the table keeps of a report."""
    causes = dict.fromkeys(identity for cause in report.causes for identity in identify_cause(cause))
    return {
        "exact": report.exact, "error": _short(report.worst.error), "causes": list(causes), "loss": report.loss,
        "padding_error": _short(report.padding_error), "batch_error": _short(report.batch_error),
        "told": list(report.causes),
    }  # fmt: skip


def merge(config: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with some of its numbers changed, nested ones too."""
    changed = {
        key: merge(config[key], value) if isinstance(value, Mapping) and isinstance(config.get(key), Mapping) else value
        for key, value in numbers.items()
    }
    return {**config, **changed}


def _short(number: float) -> float:
    return float(f"{number:.2e}")


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def _give_up(_: int, __: FrameType | None) -> None:
    raise TimeoutError(f"more than {_SECONDS} s")


def read_rows(path: Path) -> dict[Key, Row]:
    """Return the rows of the table by transformers version, class and loop."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {find_key(row): row for row in map(json.loads, lines)}


def find_key(row: Mapping[str, Any]) -> Key:
    """Return what a row is known by."""
    return row["transformers"], row["class"], row["loop"]


def write_rows(path: Path, rows: Mapping[Key, Row]) -> None:
    """Write the table, sorted by version; classes stay in their order."""
    order = {case.name: index for index, case in enumerate(CASES)}
    keys = sorted(rows, key=lambda key: (key[0], order.get(key[1], len(order)), LOOPS.index(key[2])))
    path.write_text("".join(json.dumps(rows[key]) + "\n" for key in keys), encoding="utf-8")


def list_missing(cases: tuple[Case, ...], rows: Mapping[Key, Row], again: str) -> Iterator[tuple[Case, str]]:
    """Yield what is not measured yet with the installed release, or is asked for again."""
    for case in cases:
        for loop in case.loops:
            done = (transformers.__version__, case.name, loop) in rows
            if has_loop(loop) and (not done or (again and again in f"{case.name} {loop}")):
                yield case, loop


def _tell(row: Row, seconds: float) -> str:
    def short(side: Row) -> str:
        if "error" in side:
            return f"{side['error']:.1e} {'+'.join(side['causes'])}".rstrip()
        return "refused: " + side["refused"][:80] if "refused" in side else "failed: " + side["failed"][:120]

    return f"{row['class']} {row['loop']} ({row['rows']}, {seconds:.0f} s): {short(row['installed'])} -> " + short(
        row["brim"]
    )


def main() -> None:
    """Measure what is missing, row by row, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="classes whose name contains this")
    parser.add_argument("--again", default="", help="measure anew what contains this, such as a class or a loop")
    parser.add_argument("--old", action="store_true", help="the few classes that old releases are measured with")
    parser.add_argument("--page", action="store_true", help="run nothing: write the page of the rows there are")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    source = "make exactness-old" if given.old else "make exactness"
    cases = tuple(case for case in (OLD_CASES if given.old else CASES) if given.only in case.name)
    rows = read_rows(TABLE)
    missing = [] if given.page else list(list_missing(cases, rows, given.again))
    for number, (case, loop) in enumerate(missing, 1):
        started = time.monotonic()
        row = measure_row(case, loop, source)
        rows[find_key(row)] = row
        write_rows(TABLE, rows)
        print(f"[{number}/{len(missing)}] {_tell(row, time.monotonic() - started)}", flush=True)
    ranks = [json.loads(line) for line in RANKS.read_text(encoding="utf-8").splitlines()] if RANKS.exists() else []
    PAGE.write_text(write_page(list(read_rows(TABLE).values()), ranks), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The exactness table parses, and no row under brim is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import brim

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TABLE = Path(brim.__file__).parent / "tables" / "exactness.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
NEWEST = max(ROWS, key=lambda row: tuple(map(int, row["transformers"].split("."))))["transformers"]
RANKS = [
    json.loads(line)
    for line in (BENCHMARKS / "results" / "exactness_ranks.jsonl").read_text(encoding="utf-8").splitlines()
]
LIMIT = 1e-5


def test_every_row_says_what_was_measured_with_what() -> None:
    wanted = {"transformers", "trl", "class", "group", "loop", "rows", "retrieved", "source", "installed", "brim"}
    assert [row for row in ROWS if not wanted <= set(row)] == []
    keys = [(row["transformers"], row["class"], row["loop"]) for row in ROWS]
    assert len(keys) == len(set(keys))


def test_under_brim_every_row_is_exact_or_refused_with_a_reason() -> None:
    sides = {(row["transformers"], row["class"], row["loop"]): row["brim"] for row in ROWS}
    wrong = {
        key: side for key, side in sides.items()
        if not (side.get("refused") or side.get("failed") or side["error"] <= LIMIT)
    }  # fmt: skip
    assert wrong == {}


def test_few_rows_are_left_unmeasured() -> None:
    now = [row for row in ROWS if row["transformers"] == NEWEST]
    failed = [row for row in now if "failed" in row["brim"] or "failed" in row["installed"]]
    assert len({row["class"] for row in now if row not in failed}) >= 50
    assert len(failed) <= 0.05 * len(now)


def test_as_installed_the_known_bugs_are_named() -> None:
    found = {(row["class"], row["loop"]): row["installed"] for row in ROWS if row["transformers"] == NEWEST}
    assert found["LlamaForCausalLM", "hf"]["exact"]
    assert found["T5ForConditionalGeneration", "hf"]["causes"] == ["not_divided", "mean_of_means"]
    assert found["GPT2LMHeadModel", "hf"]["causes"] == ["wrong_count"]
    assert found["LlamaForCausalLM", "accelerate"]["causes"][0] == "mean_of_means"


def test_the_page_is_that_of_the_table() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from report_exactness import write_page
    finally:
        sys.path.remove(str(BENCHMARKS))
    page = BENCHMARKS.parent / "docs" / "exactness.md"
    assert page.read_text(encoding="utf-8") == write_page(ROWS, RANKS)


def test_on_several_ranks_every_class_is_exact_or_refused() -> None:
    loops = {loop: {row["class"] for row in ROWS if row["loop"] == loop and row["transformers"] == NEWEST}
             for loop in ("hf", "sft", "accelerate", "lightning")}  # fmt: skip
    loops["plain"] = loops["hf"]
    for loop, classes in loops.items():
        for place in [(number, kind) for number in (2, 4) for kind in ("ddp", "fsdp2")]:
            found = [row for row in RANKS if (row["loop"], row["ranks"], row["sharding"]) == (loop, *place)]
            assert sorted(row["class"] for row in found) == sorted(classes), (loop, *place)
    assert [row for row in RANKS if not ("refused" in row or "failed" in row or row["error"] <= LIMIT)] == []


def test_what_fails_on_several_ranks_fails_without_brim_too() -> None:
    alone = {(row["class"], row["loop"]) for row in ROWS if "failed" in row["installed"]}
    failed = [row for row in RANKS if "failed" in row]
    kept = [row for row in failed if (row["class"], row["loop"]) not in alone]
    assert {row["sharding"] for row in kept} <= {"fsdp2"}
    assert [row for row in kept if f"cannot shard {row['class'].split()[0]} by FSDP2" not in row["failed"]] == []

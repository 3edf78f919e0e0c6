"""The page about the rule of thumb says what both answerers say today."""

from __future__ import annotations

from functools import cache

import pytest

from brim.tables.read import list_rule_rows
from rule_of_thumb import LENGTHS, MATRIX, OMISSIONS, PAGE, list_matrix, write_page


@cache
def matrix() -> tuple[str, ...]:
    """Return the lines of the page's matrix."""
    return tuple(list_matrix())


def test_the_page_costs_the_rules_own_matrix() -> None:
    """Every row of the rule's matrix is there with its batches; `40 GB+` on the card of the saying and a larger one."""
    costed = {(size, billions): batches for size, _, billions, batches in MATRIX}
    for row in list_rule_rows():
        assert costed[f"{row.card_gb:g} GB", row.billions] == row.micro_batch
    assert len(matrix()) == sum(len(batches) for _, _, _, batches in MATRIX) == 12


def test_longer_sequences_never_fit_better() -> None:
    """Peaks grow along each line, and a batch that does not fit at one length fits at no longer one."""
    for line in matrix():
        cells = line.strip("|").split("|")[2:]
        peaks = [float(cell.split()[0]) for cell in cells]
        fits = ["no" not in cell for cell in cells]
        assert len(peaks) == len(LENGTHS)
        assert peaks == sorted(peaks) and fits == sorted(fits, reverse=True)


@pytest.mark.slow
def test_the_committed_page_is_what_is_written_now() -> None:
    """docs/rule-of-thumb.md is generated, and every omission is on it."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == write_page()
    assert all(f"### {omission.title}" in page for omission in OMISSIONS)

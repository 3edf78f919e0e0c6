"""The accuracy the README claims, measured again; and that no prediction knows its answer."""

from __future__ import annotations

import importlib.util
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from accuracy import predict, predict_all, read_rows
from report_accuracy import Hit, is_known, read_error, score
from rows import HIDDEN_FROM_PREDICTOR

ROOT = Path(__file__).parents[2]
TRUTH = ROOT / "benchmarks/truth/memory.jsonl"
SCORER = ROOT.parent / "shared/truth/score.py"
STATED_GROUPS = 15


@cache
def stated_rows() -> tuple[dict[str, Any], ...]:
    """Return the single-device rows whose counter, length and configuration are all stated."""
    return tuple(row for row in read_rows(TRUTH) if is_known(row))


@cache
def predictions() -> tuple[dict[str, Any], ...]:
    """Return the formula's answers to those rows, in order."""
    return tuple(predict_all(stated_rows(), "formula"))


def hits(meter: str) -> list[Hit]:
    """Return rows of a counter with the errors of their predictions."""
    pairs = zip(stated_rows(), predictions(), strict=True)
    return [read_error(row, answer) for row, answer in pairs if row["measured"]["meter"] == meter]


def test_every_stated_group_is_predicted() -> None:
    """No row is refused."""
    assert len({row["group"] for row in stated_rows()}) == STATED_GROUPS
    assert not [answer for answer in predictions() if "unsupported" in answer]


def test_allocated_peaks_meet_the_bar() -> None:
    """Median error 5 %, 90th percentile 15 %, more than 5 % low in at most a tenth of the weight."""
    figures = score(hits("allocated"))
    assert (figures.coverage, figures.groups) == (1.0, STATED_GROUPS)
    assert figures.median <= 0.05 and figures.p90 <= 0.15 and figures.under <= 0.10


def test_device_peaks_meet_the_bar() -> None:
    """Median error 10 %: the counter's own noise is 8 %."""
    assert score(hits("device")).median <= 0.10


def test_the_formula_beats_the_rule_and_the_states_by_far() -> None:
    """The baselines are scored on the same rows."""
    formula = score(hits("allocated")).median
    for by in ("rule", "states"):
        answers = predict_all(stated_rows(), by)
        pairs = zip(stated_rows(), answers, strict=True)
        found = [read_error(row, one) for row, one in pairs if row["measured"]["meter"] == "allocated"]
        assert score(found).median > 5 * formula


def test_shuffling_what_is_hidden_changes_no_prediction() -> None:
    """Ids, groups, weights, measurements, sources and notes go to other rows; the answers stay."""
    rows, shuffled = list(stated_rows()), list(stated_rows())
    random.Random(0).shuffle(shuffled)
    for row, other, answer in list(zip(rows, shuffled, predictions(), strict=True))[::6]:
        mixed = row | {key: other[key] for key in HIDDEN_FROM_PREDICTOR}
        assert {"id": row["id"], **predict(mixed, "formula")} == answer


def test_a_row_without_the_hidden_fields_is_enough() -> None:
    """The predictor reads none of them: without them it answers the same."""
    for row, answer in list(zip(stated_rows(), predictions(), strict=True))[::20]:
        bare = {key: value for key, value in row.items() if key not in HIDDEN_FROM_PREDICTOR}
        assert {"id": row["id"], **predict(bare, "formula")} == answer


@pytest.mark.skipif(not SCORER.exists(), reason="the published scorer is not beside the checkout")
def test_our_figures_are_the_published_scorers() -> None:
    """Median, 90th percentile and under-prediction agree with score.py."""
    spec = importlib.util.spec_from_file_location("score", SCORER)
    assert spec is not None and spec.loader is not None
    scorer = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["score"] = scorer
    spec.loader.exec_module(scorer)
    rows = {row["id"]: row for row in stated_rows() if row["measured"]["meter"] == "allocated"}
    answers = {answer["id"]: answer for answer in predictions() if answer["id"] in rows}
    theirs, ours = scorer.build_report(rows, answers)["memory"], score(hits("allocated"))
    assert theirs["median_abs_error"] == pytest.approx(ours.median)
    assert theirs["p90_abs_error"] == pytest.approx(ours.p90)
    assert theirs["under_prediction_rate"] == pytest.approx(ours.under)


def test_the_committed_table_is_what_the_rows_give() -> None:
    """The margins the planner reads were generated from today's formula."""
    from brim.cost.calibration import find_accuracy

    figures, row = score(hits("allocated")), find_accuracy("formula")
    assert row is not None
    assert row.median_error_fraction == pytest.approx(figures.median, abs=2e-4)
    assert row.shortfall_p90_fraction == pytest.approx(figures.shortfall_p90, abs=2e-4)


def test_truth_rows_are_plain_json() -> None:
    """Every line of the committed copy is one object with an id of its own."""
    ids = [json.loads(line)["id"] for line in TRUTH.read_text(encoding="utf-8").splitlines()]
    assert len(ids) == len(set(ids))

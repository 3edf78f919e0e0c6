"""The accuracy the README claims, measured again; and that no prediction knows its answer."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import report_accuracy
from accuracy import ANSWERERS, predict, predict_all, read_rows
from brim.cost.calibration import find_accuracy
from brim.cost.estimate import peak_bytes
from report_accuracy import Hit, is_known, read_error, score
from rows import HIDDEN_FROM_PREDICTOR, read_row

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


class Sealed(Mapping[str, Any]):
    """A row that breaks at the first look at what the predictor must not see."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row

    def __getitem__(self, key: str) -> Any:
        assert key not in HIDDEN_FROM_PREDICTOR, f"the predictor looked at {key}"
        return self.row[key]

    def __iter__(self) -> Iterator[str]:
        return (key for key in self.row if key not in HIDDEN_FROM_PREDICTOR)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def test_the_predictor_never_looks_at_what_is_hidden() -> None:
    """A row whose id, group, weight, measurement, source and notes raise on access is answered all the same."""
    for row, answer in zip(stated_rows(), predictions(), strict=True):
        assert peak_bytes(*read_row(Sealed(row))) == answer["peak_allocated_bytes"]


def test_shuffling_what_is_hidden_changes_no_prediction() -> None:
    """Each hidden field goes to another row, each in an order of its own; every answer stays."""
    rows, chance = list(stated_rows()), random.Random(0)
    columns = {key: chance.sample([row[key] for row in rows], len(rows)) for key in HIDDEN_FROM_PREDICTOR}
    for index, (row, answer) in enumerate(zip(rows, predictions(), strict=True)):
        mixed = row | {key: values[index] for key, values in columns.items()}
        assert peak_bytes(*read_row(mixed)) == answer["peak_allocated_bytes"]
        if index % 8 == 0:
            assert {"id": row["id"], **predict(mixed, "formula")} == answer


def test_rows_of_the_same_configuration_have_the_same_answer() -> None:
    """A run read with two counters is one prediction: nothing but the configuration decides."""
    answers: dict[str, set[int]] = {}
    for row, answer in zip(stated_rows(), predictions(), strict=True):
        answers.setdefault(row["id"].partition("#")[0], set()).add(answer["peak_allocated_bytes"])
    assert len(answers) < len(stated_rows())
    assert {len(values) for values in answers.values()} == {1}


@pytest.mark.skipif(not SCORER.exists(), reason="the published scorer is not beside the checkout")
def test_our_figures_are_the_published_scorers() -> None:
    """Median, 90th percentile and under-prediction agree with score.py."""
    spec = importlib.util.spec_from_file_location("score", SCORER)
    assert spec is not None and spec.loader is not None
    scorer = importlib.util.module_from_spec(spec)
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
    figures, row = score(hits("allocated")), find_accuracy("formula")
    assert row is not None
    assert row.median_error_fraction == pytest.approx(figures.median, abs=2e-4)
    assert row.shortfall_p90_fraction == pytest.approx(figures.shortfall_p90, abs=2e-4)


@pytest.mark.slow
def test_the_committed_report_is_what_report_writes_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/accuracy.md and tables/accuracy.toml are generated together, from the formula and the trace's file."""
    rows = read_rows(TRUTH)
    monkeypatch.setattr(report_accuracy, "ROOT", tmp_path)
    for name in ("docs/accuracy.md", "src/brim/tables/accuracy.toml"):
        (tmp_path / name).parent.mkdir(parents=True)
    traced = read_rows(ROOT / "benchmarks/results/trace_predictions.jsonl")
    report_accuracy.write_report(rows, {by: predict_all(rows, by) for by in ANSWERERS} | {"trace": traced})
    for name in ("docs/accuracy.md", "src/brim/tables/accuracy.toml"):
        assert (ROOT / name).read_text(encoding="utf-8") == (tmp_path / name).read_text(encoding="utf-8"), name


def test_truth_rows_are_plain_json() -> None:
    """Every line of the committed copy is one object with an id of its own."""
    ids = [json.loads(line)["id"] for line in TRUTH.read_text(encoding="utf-8").splitlines()]
    assert len(ids) == len(set(ids))

"""The proof of accumulation as people read it."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from xml.etree import ElementTree

from rich.console import Console

from brim.checks.report import AccumulationReport, SplitResult
from brim.report.exactness import draw_errors, format_accumulation


def split(size: int, error: float, cause: str = "", window: int = 0) -> SplitResult:
    return SplitResult(
        micro_batch_size=size, gradient_accumulation_steps=8 // size, num_ranks=1, window=window,
        num_micro_batches=8 // size, error=error, norm_ratio=1 + error, cosine=1.0, cause=cause,
    )  # fmt: skip


def report(*splits: SplitResult, **facts: object) -> AccumulationReport:
    causes = tuple(dict.fromkeys(one.cause.partition(" (gradient")[0] for one in splits if one.cause))
    return AccumulationReport(
        subject="T5 <under> Trainer", loss="mean over labels != -100", precision="fp32", splits=splits, causes=causes,
        fix="trainer = brim.guard(trainer)" if causes else "", versions={"torch": "2.13.0"}, **facts,
    )  # fmt: skip


def words(shown: AccumulationReport) -> str:
    console = Console(file=StringIO(), width=140, color_system=None)
    console.print(format_accumulation(shown))
    return " ".join(console.file.getvalue().split())


def test_the_verdict_comes_first() -> None:
    text = words(report(split(8, 1e-7), split(1, 3e-7)))
    assert text.startswith("Exact: T5 <under> Trainer; every split within 3.0e-07")
    assert "Cause" not in text
    assert "truth: every sequence run alone" in text


def test_each_cause_is_said_once_and_pointed_at() -> None:
    bad = [split(4, 1.0, "not divided (gradient x 2)"), split(1, 7.0, "not divided (gradient x 8)")]
    text = words(report(split(8, 1e-7), *bad))
    assert text.startswith("Not exact: T5 <under> Trainer; micro-batch 1 x accumulation 8 is 700 % off")
    assert text.count("not divided") == 1
    assert "a: not divided" in text
    assert "trainer = brim.guard(trainer)" in text


def test_what_is_not_accumulation_is_said() -> None:
    text = words(report(split(8, 1e-7), padding_error=0.2, batch_error=0.01))
    assert "a padded batch is 20 % off its sequences run alone" in text
    assert "1 % away from single sequences" in text


def test_noise_of_sixteen_bit_is_not_blamed_on_padding() -> None:
    """And its drawing has no limit, since norm and angle are limited, not the error."""
    noisy = replace(report(split(8, 6e-3), padding_error=6e-3), precision="bf16")
    assert "a padded batch" not in words(noisy)
    assert "limit" not in draw_errors(noisy)
    assert "a padded batch" in words(replace(noisy, padding_error=0.2))


def test_no_fix_is_offered_where_there_is_none() -> None:
    assert "Fix" not in words(replace(report(split(1, 7.0, "not divided")), fix=""))


def test_the_drawing_is_whole_and_escaped() -> None:
    drawn = draw_errors(report(split(8, 0.0), split(4, 1e-7), split(1, 1e9, "bad & worse")))
    root = ElementTree.fromstring(drawn)
    bars = [float(one.attrib["width"]) for one in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert bars == sorted(bars)
    assert bars[0] == 1.0
    assert "&lt;under&gt;" in drawn


def test_a_notebook_shows_the_same() -> None:
    shown = report(split(8, 1e-7), split(1, 7.0, "not divided (gradient x 8)"))._repr_html_()
    root = ElementTree.fromstring(shown)
    assert "Not exact: T5 <under> Trainer" in "".join(root.itertext())
    assert len(root.findall(".//td")) == 14
    assert "fix: trainer = brim.guard(trainer)" in "".join(root.itertext())

"""The page of a step: whole, self-contained, small, escaped, and its drawing true to the numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from brim.cost.ledger import HeldTensor
from brim.cost.timeline import Point, Timeline
from brim.report.area import draw_timeline
from brim.report.timeline import timeline_page

GIB = 2**30
HOSTILE = '<script>alert("1")</script>&<img src=x onerror=alert(1)>'
ROWS = ("parameters", "gradients", "activations", "temporaries")
SVG = "{http://www.w3.org/2000/svg}"


def make_timeline(num_points: int = 400, phase: str = "forward of layers", capacity: int | None = 24 * GIB) -> Timeline:
    """Return memory that rises over a long phase, peaks in a short one, and falls."""
    points = []
    for ordinal in range(num_points):
        name = phase if ordinal < num_points - 4 else "loss"
        held = (8 * GIB, GIB, ordinal * 4 * GIB // num_points, (ordinal % 7) * 2**24 + (name == "loss") * GIB)
        points.append(Point(ordinal=ordinal, phase=name, row_bytes=held, reserved_bytes=15 * GIB))
    return Timeline(rows=ROWS, points=tuple(points), capacity_bytes=capacity, budget_bytes=22 * GIB)


def make_tensor(**changes: Any) -> HeldTensor:
    values: dict[str, Any] = {
        "bytes": GIB, "count": 3, "row": "activations", "module": "model.layers.*.mlp", "shape": (2, 2048, 4096),
        "dtype": "bfloat16", "op": "aten.mm.default", "line": "transformers/models/llama/modeling_llama.py:163",
    }  # fmt: skip
    return HeldTensor(**{**values, **changes})


class Tags(HTMLParser):
    """Collects tags and checks that they are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(drawing)


def read_path(path: str) -> list[tuple[float, float]]:
    """Return the corners of a path of M, H and V."""
    left = top = 0.0
    corners = []
    for letter, numbers in re.findall(r"([MHV])([-\d. ]+)", path):
        values = [float(one) for one in numbers.split()]
        left, top = values if letter == "M" else (values[0], top) if letter == "H" else (left, values[0])
        corners.append((left, top))
    return corners


def test_the_page_is_whole_and_fetches_nothing(plans: Any) -> None:
    page = timeline_page(make_timeline(), plans.make_estimate(tensors=(make_tensor(),)), "a step")
    tags = Tags(page).seen
    assert page.startswith("<!doctype html>") and {"svg", "table", "title"} <= tags
    assert not tags & {"script", "link", "img", "iframe", "image", "use"}
    assert re.findall(r"https?://[^\"' ]+", page) == ["http://www.w3.org/2000/svg"]
    assert "url(" not in page and "@import" not in page
    assert "color-scheme:light dark" in page


def test_a_step_of_a_hundred_thousand_allocations_is_a_small_page(plans: Any) -> None:
    page = timeline_page(make_timeline(100_000), plans.make_estimate(tensors=(make_tensor(),) * 60), "a step")
    assert len(page.encode()) < 300_000
    assert page.count("modeling_llama.py") == 20


def test_users_words_are_escaped(plans: Any) -> None:
    tensor = make_tensor(module=HOSTILE, line=HOSTILE, op=HOSTILE, dtype=HOSTILE)
    estimate = plans.make_estimate(peak_moment=HOSTILE, notes=(HOSTILE,), tensors=(tensor,))
    page = timeline_page(make_timeline(phase=HOSTILE), estimate, HOSTILE)
    assert not Tags(page).seen & {"script", "img"}
    assert "&lt;script&gt;" in page


def test_moments_and_tensors_stand_in_tables(plans: Any) -> None:
    estimate = plans.make_estimate(tensors=(make_tensor(shape=(), count=1234),))
    page = timeline_page(make_timeline(), estimate, "a step")
    for moment in estimate.moments:
        assert page.count(f"<td>{moment.name}</td>") == 1
    assert f'<tr class="chosen"><td>{estimate.peak_moment}</td>' in page
    assert "scalar bfloat16" in page and "1,234" in page
    assert "Largest tensors" not in timeline_page(make_timeline(), plans.make_estimate(), "a step")


def test_the_drawing_is_true_to_the_bytes() -> None:
    """The topmost area's highest corner over capacity's line is the peak over the capacity."""
    timeline = make_timeline()
    root = parse(draw_timeline(timeline))
    paths = [one for one in root.iter(f"{SVG}path") if one.attrib["fill"] != "none"]
    assert len(paths) == len(ROWS)
    corners = read_path(paths[0].attrib["d"])
    floor, top = max(y for _, y in corners), min(y for _, y in corners)
    limit = next(one for one in root.iter(f"{SVG}line") if one.attrib.get("stroke-dasharray") == "")
    peak = max(point.allocated_bytes for point in timeline.points)
    assert (floor - top) / (floor - float(limit.attrib["y1"])) == pytest.approx(peak / (24 * GIB), abs=0.001)
    reserved = next(one for one in root.iter(f"{SVG}path") if one.attrib["fill"] == "none")
    level = read_path(reserved.attrib["d"])[0][1]
    assert (floor - level) / (floor - float(limit.attrib["y1"])) == pytest.approx(15 / 24, abs=0.001)
    circle = next(root.iter(f"{SVG}circle"))
    assert float(circle.attrib["cy"]) == pytest.approx(top, abs=0.1)


def test_a_short_phase_is_wide_enough_to_be_seen() -> None:
    root = parse(draw_timeline(make_timeline(100_000)))
    bands = [one for one in root.iter(f"{SVG}rect") if one.attrib.get("fill-opacity") == "0.05"]
    assert float(bands[0].attrib["width"]) > 40
    names = [one.text for one in root.iter(f"{SVG}text")]
    assert {"forward of layers", "loss"} <= set(names)
    assert any(name and name.startswith("peak 14.0") and name.endswith(", loss") for name in names)


@pytest.mark.parametrize("capacity", [None, 1, 2**40, 14 * GIB])
@pytest.mark.parametrize("num_points", [1, 5, 3000])
def test_everything_stays_inside_the_frame(capacity: int | None, num_points: int) -> None:
    root = parse(draw_timeline(make_timeline(num_points, capacity=capacity)))
    width, height = (float(one) for one in root.attrib["viewBox"].split()[2:])
    for one in root.iter(f"{SVG}path"):
        for left, top in read_path(one.attrib["d"]):
            assert 0 <= left <= width and 0 <= top <= height
    for one in root.iter(f"{SVG}rect"):
        assert 0 <= float(one.attrib["x"]) <= float(one.attrib["x"]) + float(one.attrib["width"]) <= width + 0.1
    for one in root.iter(f"{SVG}line"):
        assert 0 <= float(one.attrib["y1"]) <= height


def test_many_phases_share_the_width() -> None:
    points = [
        Point(ordinal=index, phase=f"phase {index}", row_bytes=(index,), reserved_bytes=index) for index in range(80)
    ]
    root = parse(draw_timeline(Timeline(rows=("parameters",), points=tuple(points))))
    assert all(float(one.attrib["width"]) >= 0 for one in root.iter(f"{SVG}rect"))


def test_a_capacity_far_above_is_said_rather_than_drawn() -> None:
    drawing = draw_timeline(make_timeline(capacity=80 * GIB))
    assert "above the drawing" in drawing
    assert "above the drawing" not in draw_timeline(make_timeline(capacity=24 * GIB))


def test_nothing_recorded_is_said(plans: Any) -> None:
    empty = replace(make_timeline(), points=())
    assert "No allocation was recorded" in timeline_page(empty, plans.make_estimate(), "a step")

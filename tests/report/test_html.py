"""A plan as HTML: whole, self-contained, and the user's words escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from brim.report.html import format_plan_html
from brim.report.svg import COLORS, draw_moments

VOID = {"br", "hr", "img", "meta"}
HOSTILE = '<script>alert("1")</script>&<img src=x onerror=alert(1)>'


class Balance(HTMLParser):
    """Checks that every tag is closed, and collects the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return parser


def test_every_tag_is_closed_and_nothing_is_fetched(plans: Any) -> None:
    html = format_plan_html(plans.make_plan())
    tags = parse(html).seen
    assert {"svg", "table", "style", "details"} <= tags
    assert not tags & {"script", "link", "img", "iframe", "image", "use"}
    assert re.findall(r"https?://[^\"' ]+", html) == ["http://www.w3.org/2000/svg"]
    assert "url(" not in html and "@import" not in html


def test_the_users_words_are_escaped(plans: Any) -> None:
    moment = plans.Moment(name=HOSTILE, ledger=plans.make_ledger())
    plan = plans.make_plan(
        workload=plans.make_workload(model=plans.make_model(HOSTILE)), reasons=(HOSTILE,), assumptions=(HOSTILE,),
        warnings=(plans.PlanWarning(code="x", text=HOSTILE),),
        estimate=plans.make_estimate(moments=(moment,), peak_moment=HOSTILE, notes=(HOSTILE,)),
    )  # fmt: skip
    html = format_plan_html(plan)
    assert not parse(html).seen & {"script", "img"}
    assert "&lt;script&gt;" in html


def test_a_plan_shows_itself_in_notebooks(plans: Any) -> None:
    plan = plans.make_plan()
    assert plan._repr_html_() == format_plan_html(plan)


@pytest.mark.parametrize("capacity_bytes", [0, 1, 2**30, 2**50])
def test_the_drawing_is_xml_and_stays_inside_its_frame(plans: Any, capacity_bytes: int) -> None:
    drawing = draw_moments(plans.make_estimate(), capacity_bytes=capacity_bytes, budget_bytes=capacity_bytes // 2)
    root = ElementTree.fromstring(drawing)
    width = float(root.attrib["viewBox"].split()[2])
    for bar in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert 0 <= float(bar.attrib["x"]) <= float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width


def test_every_ledger_row_has_its_own_colour(plans: Any) -> None:
    from brim.report.memory import LEDGER_ROWS

    named = [COLORS[row.replace("_", " ")] for row in LEDGER_ROWS]
    assert len(set(named)) == len(named)


def test_the_page_around_decides_text_colours(plans: Any) -> None:
    """Bars aside, nothing has a colour of its own: that is what makes it work on black and on white."""
    html = format_plan_html(plans.make_plan())
    colours = set(re.findall(r"(?<![-\w])color:([^;}]+)", html))
    assert colours == {"inherit"}

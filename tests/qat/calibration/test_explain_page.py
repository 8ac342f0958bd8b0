"""The picture of how ranges are chosen: what is drawn where, and that nothing in it is taken for markup."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from explanations import KINDS, explained, samples
from hypothesis import given
from hypothesis import strategies as st

from qat.base.number_format import low_bit_format
from qat.calibration.explain import Explanation
from qat.calibration.explain_page import (
    LABEL_GAP,
    LEFT,
    POINTS,
    RIGHT,
    Axis,
    Span,
    draw_explanations,
    linear_ticks,
    log_ticks,
    points_of,
    spread,
)


class Elements(HTMLParser):
    """All start tags of a page, and a check that each that must be closed is."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(" ".join(data.split()))

    def of(self, tag: str, start: str = "") -> Iterator[dict[str, str]]:
        return (attrs for name, attrs in self.found if name == tag and attrs.get("class", "").startswith(start))


def drawn(kind: str, **changes: object) -> tuple[Explanation, Elements]:
    found = replace(explained(samples(kind)), **changes)  # type: ignore[arg-type]
    return found, Elements(draw_explanations([found]))


@pytest.mark.parametrize("kind", KINDS)
def test_lines_stand_at_the_thresholds_and_marks_at_the_minima(kind: str) -> None:
    found, page = drawn(kind)
    end = found.largest

    def x(amax: float) -> float:
        return LEFT + (RIGHT - LEFT) * amax / end

    lines = {attrs["class"].split()[1]: attrs["d"] for attrs in page.of("path", "threshold")}
    assert lines.keys() == {"max", "percentile", "mse", "entropy"}
    for choice in found.choices:
        assert float(re.findall(r"L([\d.]+) ", lines[choice.method])[0]) == pytest.approx(x(choice.amax), abs=0.06)
    marks = [float(attrs["cx"]) for attrs in page.of("circle")]
    amax = {choice.method: choice.amax for choice in found.choices}
    assert marks == [pytest.approx(x(amax[method]), abs=0.06) for method in ("entropy", "mse")]
    for curve, attrs, circle in zip((found.kl, found.mse), page.of("path", "curve"), page.of("circle"), strict=True):
        assert curve is not None
        points = [tuple(map(float, point.split())) for point in re.findall(r"[ML]([\d.]+ [\d.]+)", attrs["d"])]
        assert len(points) <= POINTS + 30
        assert float(circle["cy"]) == pytest.approx(max(y for _, y in points), abs=0.11)  # the lowest


@pytest.mark.parametrize("kind", KINDS)
def test_labels_do_not_overlap_and_are_in_the_picture(kind: str) -> None:
    _, page = drawn(kind)
    boxes = sorted((float(r["x"]), float(r["x"]) + float(r["width"])) for r in page.of("rect") if "rx" in r)
    assert len(boxes) == 4
    assert boxes[0][0] >= LEFT - 0.1
    assert boxes[-1][1] <= RIGHT + 0.1
    assert all(before[1] < after[0] for before, after in itertools.pairwise(boxes))


def test_the_bars_hold_every_value() -> None:
    found, page = drawn("relu")
    (bars,) = page.of("path", "bars")
    assert bars["d"].startswith(f"M{LEFT} ")
    assert float(re.findall(r"H([\d.]+)", bars["d"])[-1]) == pytest.approx(RIGHT, abs=0.1)
    heights = [float(y) for y in re.findall(r"V([\d.]+)H", bars["d"])]
    assert heights[0] == min(heights)  # the zeros: the highest bar
    share = 100 * found.counts[0] / 50_000
    assert share > 49
    assert f"{share:.1f} % of the values lie in the first of 2048 bins" in " ".join(page.texts)
    assert sum(found.counts) == 50_000


def test_the_page_needs_no_other_file_and_tells_a_screen_reader_what_it_shows() -> None:
    found, page = drawn("signed")
    text = draw_explanations([found])
    assert not re.search(r"https?:|src=|@import|url\(|<script|<link", text)
    (picture,) = page.of("svg")
    ids = {attrs["id"] for _, attrs in page.found if "id" in attrs}
    assert picture["role"] == "img"
    assert set(picture["aria-labelledby"].split()) == ids
    amax = {choice.method: choice.amax for choice in found.choices}
    (description,) = (text for text in page.texts if text.startswith("Histogram of 50000 magnitudes"))
    assert all(f"{method} {value:.4g}" in description for method, value in amax.items())
    assert f"nats at {amax['entropy']:.4g}" in description


def test_names_are_no_markup() -> None:
    evil = "<script>alert(1)</script>&\"'"
    found, page = drawn("signed", name=evil, tensors=(evil, "<b>other"))
    assert "script" not in [tag for tag, _ in page.found]
    text = draw_explanations([found], evil)
    assert "<script" not in text
    assert "<b>other" not in text
    assert any(evil in words for words in page.texts)


def test_tensors_without_a_range_have_no_picture() -> None:
    dead, absent = explained(torch.zeros(7)), explained(None)
    page = Elements(draw_explanations([dead, absent]))
    assert not list(page.of("svg"))
    assert len(list(page.of("tr"))) == 5  # the dead one's
    said = " ".join(page.texts)
    assert dead.problem in said
    assert absent.problem in said
    assert "nan" not in said.split()
    Elements(draw_explanations([]))


def test_a_range_in_use_beyond_all_values_widens_the_axis() -> None:
    found = explained(samples("signed"), low_bit_format(4, signed=True), 12.0)
    page = Elements(draw_explanations([found]))
    (line,) = (attrs["d"] for attrs in page.of("path", "threshold in use"))
    assert f"L{RIGHT:.1f} " in line
    assert "is one that none of the four chose" in " ".join(page.texts)
    (row,) = page.of("tr", "used")
    assert row


@given(st.lists(st.tuples(st.floats(66, 944), st.floats(20, 160)), min_size=1, max_size=5))
def test_boxes_are_spread(boxes: list[tuple[float, float]]) -> None:
    boxes.sort()
    centres, widths = [list(values) for values in zip(*boxes, strict=True)]
    found = spread(centres, widths, Span(LEFT, RIGHT))
    ends = [(centre - width / 2, centre + width / 2) for centre, width in zip(found, widths, strict=True)]
    assert ends[0][0] >= LEFT - 1e-6
    assert ends[-1][1] <= RIGHT + 1e-6
    assert all(after[0] - before[1] >= LABEL_GAP - 1e-6 for before, after in itertools.pairwise(ends))


def test_boxes_with_room_stay_where_they_are() -> None:
    assert spread([200, 400, 600], [80, 80, 80], Span(66, 944)) == [200, 400, 600]


@given(st.floats(-300, 300), st.floats(0.02, 40))
def test_ticks_are_few_round_and_inside(power: float, decades: float) -> None:
    values = Span(10**power, 10 ** min(power + decades, 307))
    found = log_ticks(values)
    assert len(found) <= 6
    assert found == sorted(found)
    assert all(values.low <= value <= values.high and f"{value:e}"[0] in "125" for value in found)
    assert decades < 1 or len(found) >= 2


@pytest.mark.parametrize(
    ("high", "ticks"), [(1.0, 11), (4.66, 10), (10.0, 11), (0.31, 7), (9.99e-12, 10), (2.0, 11), (300.0, 7)]
)
def test_ticks_of_thresholds(high: float, ticks: int) -> None:
    found = linear_ticks(high)
    assert (found[0], len(found)) == (0, ticks)
    assert found[-1] <= high * (1 + 1e-9)


def test_an_axis_of_logarithms() -> None:
    axis = Axis(Span(1, 100), Span(300, 100))
    assert [axis(value) for value in (1, 10, 100, 0, 1e9)] == pytest.approx([300, 200, 100, 300, 100])


@pytest.mark.parametrize("kind", KINDS)
def test_a_curve_of_many_candidates_is_drawn_at_few_and_at_the_least(kind: str) -> None:
    found = explained(samples(kind))
    for curve in (found.kl, found.mse):
        assert curve is not None
        points = points_of(curve)
        assert len(points) <= POINTS + 30
        assert (curve.amax[curve.best], curve.cost[curve.best]) in points
        assert points[0][0] == curve.amax[0]
        assert points[-1][0] == curve.amax[-1]

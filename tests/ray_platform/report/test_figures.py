"""Line charts place points at their values, have readable labels, and use the page's colors."""

import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_platform.report.figures import COLORS, Line, Point, line_chart, profile, round_ticks


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_ticks_are_round_evenly_spaced_and_around_all_values(values):
    ticks = round_ticks(values)
    assert 2 <= len(ticks) <= 8
    step = ticks[1] - ticks[0]
    assert ticks[0] <= min(values) + 1e-6 * step
    assert ticks[-1] >= max(values) - 1e-6 * step
    assert all(abs(b - a - step) <= 1e-6 * step for a, b in itertools.pairwise(ticks))


def elements(chart, tag):
    return list(ElementTree.fromstring(chart.__html__()).iter(tag))


def centers(chart):
    return [(float(circle.get("cx")), float(circle.get("cy"))) for circle in elements(chart, "circle")]


def places(chart):
    """Return the texts of a chart with their positions."""
    return {text.text: (float(text.get("x")), float(text.get("y"))) for text in elements(chart, "text")}


def test_points_are_where_their_values_are():
    line = Line("", [Point(1, 10.0, tooltip="a"), Point(10, 20.0, tooltip="b < c"), Point(100, 30.0)])
    chart = line_chart([line], "steps", "accuracy, %", [1, 10, 100])
    (x1, y1), (x2, y2), (x3, y3) = centers(chart)
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # logarithmic
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    assert y1 > y3  # larger is higher
    (x1, _), (x2, _), (x3, _) = centers(line_chart([line], "x", "y"))
    assert (x2 - x1) / (x3 - x1) == pytest.approx(9 / 99, abs=0.01)
    assert [title.text for title in elements(chart, "title")][:2] == ["a", "b < c"]
    for points in ([Point(3, 3)], [Point(0, 0), Point(0, 0)], [Point(-5, 1e-9), Point(5, 1e9)]):
        assert all(0 <= x <= 440 and 0 <= y <= 280 for x, y in centers(line_chart([Line("name", points)], "x", "y")))


def test_labels_are_apart_and_inside():
    lines = [Line(f"{n} draws", [Point(1, 0.1 * n), Point(2, 5 + 0.001 * n)]) for n in range(8)]
    names = [place for name, place in places(line_chart(lines, "x", "y", [1, 2])).items() if name.endswith("draws")]
    ys = sorted(y for _, y in names)
    assert len(ys) == 8
    assert all(b - a >= 13.9 for a, b in itertools.pairwise(ys))
    assert 0 < ys[0] < ys[-1] < 280
    assert all(0 < x < 440 - 40 for x, _ in names)
    close = ((0, 0, "p0.5"), (1, 3.0, "p1"), (1.07, 2.95, "p1.5"), (1.12, 2.9, "p2"), (1.15, 2.95, "p3"), (3, 6, "p7.5"))
    chart = line_chart([Line("", [Point(*each) for each in close])], "x", "y")
    labels = [(x, y, 6 * len(name)) for name, (x, y) in places(chart).items() if name[0] == "p"]
    assert len(labels) == 6
    for (x1, y1, width1), (x2, y2, width2) in itertools.combinations(labels, 2):
        assert x1 + width1 < x2 or x2 + width2 < x1 or abs(y1 - y2) >= 10
    assert all(x + width < 440 and y < 280 for x, y, width in labels)
    long = places(line_chart([Line("n" * 300, [Point(1, 1, "l" * 300), Point(2, 2)])], "x", "y"))
    assert {"n" * 23 + "…", "l" * 23 + "…"} <= set(long)
    wide = places(line_chart([Line("a name", [Point(2560, 1), Point(20480, 2)])], "samples", "y"))
    ticks = sorted(x for text, (x, _) in wide.items() if text.endswith("000"))
    assert len(ticks) >= 3
    assert all(b - a > 6 * 6.8 for a, b in itertools.pairwise(ticks))


def test_a_profile_falls_from_best_to_worst():
    area, baseline = elements(profile([0.2, 1.0, 0.5], [0.1]), "path")
    ys = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", area.get("d"))]
    assert ys[1:-1] == sorted(ys[1:-1])
    assert {0.0, 50.0, 80.0} <= {round(y) for y in ys}
    assert 90.0 in {round(float(y)) for _, y in re.findall(r"([\d.]+) ([\d.]+)", baseline.get("d"))}


def test_colors_follow_the_page_and_a_file_has_its_own():
    line = Line("", [Point(1, 1), Point(2, 2, hollow=True)], color="m1", dashed=True)
    chart = line_chart([line], "x", "y")
    filled, hollow = (circle.get("style") for circle in elements(chart, "circle"))
    assert "fill: var(--m1); stroke: var(--card)" in filled
    assert "fill: var(--card); stroke: var(--m1)" in hollow
    assert not re.search(r"#[0-9a-f]{6}", chart.__html__())
    svg = chart.standalone("a < b", "a note")
    assert {"a < b", "a note"} <= {text.text for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert COLORS["m1"] in svg
    assert "var(" not in svg

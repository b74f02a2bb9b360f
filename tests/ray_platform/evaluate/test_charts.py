"""What is drawn is where its value is, and labels can be read."""

import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_platform.report.charts import Line, Point, line_chart, profile, standalone, ticks


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_ticks_are_round_evenly_spaced_and_around_all_values(values):
    marks = ticks(values)
    assert 2 <= len(marks) <= 8
    step = marks[1] - marks[0]
    assert marks[0] <= min(values) + 1e-6 * step
    assert marks[-1] >= max(values) - 1e-6 * step
    assert all(abs(b - a - step) <= 1e-6 * step for a, b in itertools.pairwise(marks))


def numbers(svg: str, pattern: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, found)) for found in re.findall(pattern, svg)]


def test_points_are_where_their_values_are():
    line = [Point(1, 10.0, about="a"), Point(10, 20.0, about="b"), Point(100, 30.0, about="c")]
    (x1, y1), (x2, y2), (x3, y3) = numbers(line_chart([Line("", line)], "x", "y", [1, 10, 100]), r'cx="([\d.]+)" cy="([\d.]+)"')
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # logarithmic
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    assert y1 > y3  # larger is higher
    (x1, _), (x2, _), (x3, _) = numbers(line_chart([Line("", line)], "x", "y"), r'cx="([\d.]+)" cy="([\d.]+)"')
    assert (x2 - x1) / (x3 - x1) == pytest.approx(9 / 99, abs=0.01)


def test_names_of_lines_that_meet_are_apart_and_inside():
    lines = [Line(f"{n} draws", [Point(1, 0.1 * n), Point(2, 5 + 0.001 * n)]) for n in range(8)]
    svg = line_chart(lines, "x", "y", [1, 2])
    _, _, width, height = map(float, re.search(r'viewBox="([\d. ]+)"', svg)[1].split())
    places = numbers(svg, r'class="name" x="([\d.]+)" y="([\d.]+)">')
    assert len(places) == 8
    ys = sorted(y for _, y in places)
    assert all(b - a >= 13.9 for a, b in itertools.pairwise(ys))
    assert 0 < ys[0] < ys[-1] < height
    assert all(0 < x < width - 40 for x, _ in places)


def test_labels_of_points_do_not_cover_each_other():
    close = ((1, 3.0, "1"), (1.07, 2.95, "1.5"), (1.12, 2.9, "2"), (1.15, 2.95, "3"))
    points = [Point(0, 0, "0.5"), *(Point(*each) for each in close), Point(3, 6, "7.5")]
    svg = line_chart([Line("", points)], "x", "y")
    places = [
        (float(x), float(y), 6 * len(name)) for x, y, name in re.findall(r'class="name" x="([\d.]+)" y="([\d.]+)">(.*?)<', svg)
    ]
    assert len(places) == 6
    for (x1, y1, width1), (x2, y2, width2) in itertools.combinations(places, 2):
        assert x1 + width1 < x2 or x2 + width2 < x1 or abs(y1 - y2) >= 10
    assert all(x + width < 440 and y < 280 for x, y, width in places)


def test_a_profile_falls_from_best_to_worst():
    shape = profile([0.2, 1.0, 0.5], [0.1], 100)
    assert 'd="M0 1L0 0.0000L1 0.0000L1 0.5000L2 0.5000L2 0.8000L3 0.8000L3 1Z"' in shape
    assert 'd="M0 0.9000L1 0.9000"' in shape
    assert profile([0.5], [], 10).count("<path") == 1


def test_looks_of_lines_and_dots():
    line = Line("", [Point(1, 1), Point(2, 2, hollow=True)], colour="var(--m1)", dashed=True)
    svg = line_chart([line, Line("", [Point(1.5, 1.5)])], "x", "y")
    assert svg.count('style="color:var(--m1)" class="dashed"') == 1
    assert svg.count('class="dot"') == 2
    assert svg.count('class="dot hollow"') == 1


def test_names_and_labels_longer_than_the_chart_are_cut():
    svg = line_chart([Line("n" * 300, [Point(1, 1, "l" * 300), Point(2, 2)])], "x", "y")
    assert svg.count("n" * 23 + "…") == svg.count("l" * 23 + "…") == 1
    assert "n" * 24 not in svg


def test_a_chart_as_a_file_knows_its_colours():
    dark = "@media (prefers-color-scheme: dark) { :root { --m1: #fedcba; } }"
    style = f":root {{ --m1: #123456; }}\n{dark}\nsvg .dot {{ fill: var(--m1); }}\n"
    svg = standalone(line_chart([Line("", [Point(1, 1), Point(2, 2)], colour="var(--m1)")], "x", "y"), style, "a < b", "a note")
    root = ElementTree.fromstring(svg)
    assert root.get("width") == "440"
    assert "svg .dot { fill: #123456; }" in svg
    assert 'style="color:#123456"' in svg
    assert "fedcba" not in svg
    assert "var(" not in svg
    assert "a &lt; b" in svg


def test_marks_of_an_axis_are_inside_and_apart():
    svg = line_chart([Line("a name", [Point(2560, 1), Point(20480, 2)])], "samples", "y")
    places = [(float(x), label) for x, label in re.findall(r'x="([\d.]+)" y="253" text-anchor="middle">([\d,]+)<', svg)]
    assert [label for _, label in places] == ["5,000", "10,000", "15,000", "20,000"]
    assert all(b - a > 6 * 6.8 for (a, _), (b, _) in itertools.pairwise(places))
    narrow = line_chart([Line("a name of 24 characters.", [Point(2560, 1), Point(20480, 2)])], "samples", "y")
    assert len(re.findall(r'y="253" text-anchor="middle"', narrow)) < 4

import re

import numpy as np
import pytest

from llmlab.report.curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_DOTS,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Curve,
    chart,
    number_text,
    thinned,
)


def polylines(markup):
    return [
        np.array([[float(v) for v in point.split(",")] for point in points.split()])
        for points in re.findall(r'<polyline[^>]* points="([^"]*)"', markup)
    ]


def test_points_land_where_a_linear_map_puts_them():
    points = [(0.0, 5.0), (3.0, 1.0), (10.0, 2.0)]
    (line,) = polylines(chart("t", [Curve("c", points)]))
    xs, ys = np.array(points).T
    np.testing.assert_allclose(line[:, 0], np.interp(xs, [0, 10], [LEFT, WIDTH - RIGHT]), atol=0.01)
    np.testing.assert_allclose(line[:, 1], np.interp(ys, [1, 5], [HEIGHT - BOTTOM, TOP]), atol=0.01)


def test_a_logarithmic_axis_places_decades_evenly_and_only_where_asked():
    points = [(1.0, 0.01), (2.0, 1.0), (3.0, 100.0)]
    (log,) = polylines(chart("t", [Curve("c", points)], may_be_log=True))
    (linear,) = polylines(chart("t", [Curve("c", points)]))
    middle = (HEIGHT - BOTTOM + TOP) / 2
    assert log[1, 1] == pytest.approx(middle, abs=0.01)
    assert linear[1, 1] > middle + 50


def test_a_missing_value_is_a_gap_and_a_lone_point_a_dot():
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 1.5), (4, None), (5, 1.0), (6, 1.2)]
    markup = chart("t", [Curve("c", points)])
    assert [len(line) for line in polylines(markup)] == [2, 2]
    assert markup.count("<circle") == 1
    assert "c: 1.5 at 3" in markup


def test_dots_mark_every_point_until_there_are_too_many():
    few, many = [(i, float(i)) for i in range(MOST_DOTS)], [(i, float(i)) for i in range(MOST_DOTS + 1)]
    assert chart("t", [Curve("c", few, dots=True)]).count("<circle") == MOST_DOTS
    assert chart("t", [Curve("c", many, dots=True)]).count("<circle") == 0


def test_one_polyline_for_each_curve_and_a_legend_that_names_them():
    curves = [Curve(f"run <{i}>", [(0, 1.0), (1, float(i))], i) for i in range(5)]
    markup = chart("t", curves)
    assert len(polylines(markup)) == 5
    assert [f"run &lt;{i}&gt;" in markup for i in range(5)] == [True] * 5
    assert "legend" not in chart("t", curves, legend=False)


def test_nothing_finite_is_no_chart():
    assert chart("t", []) == ""
    assert chart("t", [Curve("c", [(0, None)])]) == ""


@pytest.mark.parametrize("points", [[(5, 2.0)], [(0, 0.0), (1, 0.0)], [(0, 1e-30), (1, 1e30)], [(0, -3.0), (1, -3.0)]])
def test_degenerate_ranges_draw_inside_the_chart(points):
    markup = chart("t", [Curve("c", points)], may_be_log=True)
    assert "nan" not in markup
    places = re.findall(r'c([xy])="([^"]*)"', markup) + [
        (axis, value) for line in polylines(markup) for x, y in line for axis, value in (("x", x), ("y", y))
    ]
    assert places
    for axis, place in places:
        assert 0 <= float(place) <= (WIDTH if axis == "x" else HEIGHT)


def test_thinning_keeps_the_ends_and_every_spike():
    rng = np.random.default_rng(0)
    values = rng.normal(size=20_000)
    values[[7, 12_345]] = 50, -60
    points = [(float(i), float(v)) for i, v in enumerate(values)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 2
    assert {points[0], points[-1], points[7], points[12_345]} <= set(kept)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)


@pytest.mark.parametrize("low, high", [(0, 1), (1.31, 4.2), (5432.1, 5799.9), (0, 4e-4), (-3, 7), (1, 400), (0, 1e9)])
def test_ticks_are_few_inside_even_and_round(low, high):
    ticks = Axis(low, high).ticks()
    assert 2 <= len(ticks) <= 11
    assert low <= ticks[0] + 1e-9
    assert ticks[-1] <= high * (1 + 1e-9)
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    mantissa = steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5)) < 1e-6


@pytest.mark.parametrize("low, high", [(0.001, 0.01), (1, 1e12), (0.5, 3), (2.1, 2.2)])
def test_logarithmic_ticks_lie_inside(low, high):
    ticks = Axis(low, high, log=True).ticks()
    assert 1 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)


@pytest.mark.parametrize(
    "value, text",
    [(0.003, "0.003"), (1.71, "1.71"), (400, "400"), (12_000, "12k"), (2_500_000, "2.5M"), (-20_000, "-20k")],
)
def test_numbers_are_short(value, text):
    assert number_text(value) == text

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.record.curves import BUCKETS, Axis, Series, chart, curves, round_values


def rows(values, name="loss", **more):
    return [{"step": i + 1, "samples": 10 * (i + 1), name: v, **more} for i, v in enumerate(values)]


def points(html, kind="line"):
    """The subpaths of the first path of a kind, as lists of (x, y) in parts of the box, y upward."""
    (path,) = re.findall(rf'class="{kind} s1" d="([^"]*)"', html)
    numbers = [re.findall(r"([\d.]+) ([\d.]+)", part) for part in path.split("M")[1:]]
    return [[(float(x) / 1000, 1 - float(y) / 1000) for x, y in part] for part in numbers]


def test_few_rows_are_drawn_as_they_are():
    data = curves(rows([1.0, 3.0, 2.0]))
    assert data.series["loss"].mean == [1.0, 3.0, 2.0] and data.step == [1, 2, 3] and data.unit == "samples"
    (line,) = points(chart("Loss", ["loss"], data))
    low, high = 1 - 0.12, 3 + 0.12
    expected = [(i / 3, (v - low) / (high - low)) for i, v in ((1, 1), (2, 3), (3, 2))]
    assert np.allclose(line, expected, atol=2e-4)


def test_many_rows_are_thinned_to_mean_and_extremes():
    values = np.random.default_rng(0).normal(size=10 * BUCKETS)
    data = curves(rows(values.tolist()))
    blocks = values.reshape(BUCKETS, 10)
    one = data.series["loss"]
    assert np.allclose(np.array(one.mean, float), blocks.mean(1))
    assert one.low == blocks.min(1).tolist() and one.high == blocks.max(1).tolist()
    assert data.x[-1] == 10 * len(values) and len(data.x) == BUCKETS
    (band,) = points(chart("Loss", ["loss"], data), "band")
    assert len(band) == 2 * BUCKETS


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_leaves_a_gap_and_a_mark(bad):
    html = chart("Loss", ["loss"], curves(rows([1.0, 2.0, bad, 2.0, 1.0])))
    assert [len(part) for part in points(html)] == [2, 2]
    assert html.count('class="broken" style="left:60.00%"') == 1


def test_a_quantity_logged_now_and_then_is_one_line():
    data = curves([r if r["step"] % 2 else r | {"extra": r["step"]} for r in rows(range(1, 7))])
    html = chart("extra", ["extra"], data)
    assert [len(part) for part in points(html)] == [3] and "broken" not in html


def test_a_curve_without_any_finite_value():
    html = chart("Loss", ["loss"], curves(rows([math.nan, math.nan])))
    assert "not finite" in html and 'class="line' not in html


def test_a_single_row_is_a_dot():
    html = chart("Loss", ["loss"], curves(rows([0.5])))
    assert points(html, "dots") == [[(1.0, 0.5)]]


def test_restarts_lie_where_the_attempt_changes():
    data = curves([r | {"attempt": int(r["step"] > 2)} for r in rows([1.0] * 4)])
    assert data.restarts == [30]
    assert 'class="restart" style="left:75.00%"' in chart("Loss", ["loss"], data)


def test_names_are_escaped():
    html = chart("<b>", ["<i>"], curves(rows([1.0, 2.0], name="<i>")))
    assert "<b>&lt;b&gt;</b>" in html and 'data-series="&lt;i&gt;"' in html


def axis(values, from_zero=False):
    return Axis.fit([Series(values, values, values, [False] * len(values))], from_zero)


def test_the_axis_is_logarithmic_only_for_towering_positive_values():
    assert axis([1.0] * 9 + [100.0]).log
    assert not axis([1.0] * 9 + [10.0]).log
    assert not axis([0.0] + [1.0] * 9 + [100.0]).log


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=9), st.booleans())
def test_every_value_and_tick_lies_inside_the_axis(values, from_zero):
    fit = axis(values, from_zero)
    assert all(-1e-9 <= fit.place(v) <= 1 + 1e-9 for v in [*values, *fit.ticks()])
    assert 1 <= len(fit.ticks()) <= 7


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_round_values_are_round(low, span):
    ticks = round_values(low, low + span)
    assert 3 <= len(ticks) <= 7
    unit = ticks[1] - ticks[0]
    mantissa = unit / 10 ** math.floor(math.log10(unit) + 1e-6)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-2

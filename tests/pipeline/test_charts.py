import math
import re

import pytest

from jaxllm.figures import Panel
from jaxllm.pipeline import charts

LOSS = charts.PANELS[0]


def rows(values, name="loss"):
    return [{"step": step, name: value} for step, value in enumerate(values)]


def attributes(markup, kind, *names):
    """The numbers of every line, circle or rectangle of that class."""
    found = re.findall(rf'<\w+ class="{kind}"[^>]*>', markup)
    return [tuple(float(re.search(rf'{name}="([^"]*)"', tag)[1]) for name in names) for tag in found]


def path(markup, kind):
    corners = re.search(rf'<path class="{kind}" d="M([^"]*)"', markup)[1]
    return [tuple(map(float, corner.split())) for corner in corners.split("L")]


@pytest.mark.parametrize(
    "value, said",
    [
        *((0.8625, "0.863"), (12.345, "12.3"), (-1.5, "−1.5"), (0, "0"), (1.0, "1"), (999.4, "999"), (999.6, "1,000")),
        *((20480, "20,480"), (410_000, "410\u00a0k"), (0.00123, "0.00123"), (1e-4, "1e−4"), (-4.4e-5, "−4.4e−5")),
        *((None, "–"), (math.nan, "–"), (math.inf, "–"), ("NaN", "–"), (True, "–")),
    ],
)
def test_a_number_has_three_digits_and_what_is_none_is_a_dash(value, said):
    assert charts.number(value) == said


@pytest.mark.parametrize(
    "value, said", [(0.8625, "86.2\u00a0%"), (0.8, "80\u00a0%"), (1, "100\u00a0%"), (-0.05, "−5\u00a0%"), (None, "–")]
)
def test_a_share_is_a_percentage(value, said):
    assert charts.number(value, "share") == said


def test_an_interval_says_its_unit_once_and_is_empty_where_an_end_is_not_known():
    assert charts.interval(0.812, 0.9, "share") == "81.2 to 90\u00a0%"
    assert charts.interval(-0.1, 2) == "−0.1 to 2"
    assert charts.interval(None, 2) == charts.interval(2, math.nan) == ""


@pytest.mark.parametrize(
    "value, said", [(1.2e13, "12\u00a0T"), (999.6, "1\u00a0k"), (0, "0"), (7e27, "7000\u00a0Y"), (None, "–")]
)
def test_an_amount_has_a_letter_for_its_thousands(value, said):
    assert charts.amount(value) == said
    assert charts.amount(3e9, charts.COUNTS) == "3\u00a0B"


@pytest.mark.parametrize(
    "seconds, said",
    [
        *((3.21, "3.2 s"), (9.97, "10 s"), (59.7, "1 min"), (71.2, "1 min 11 s"), (7500, "2 h 5 min"), (0, "0.0 s")),
        *((3599.9, "1 h"), (90061, "25 h 1 min"), (None, "–")),
    ],
)
def test_a_duration_names_its_two_largest_units(seconds, said):
    assert charts.duration(seconds).replace("\u00a0", " ") == said


def test_a_span_holds_all_values_and_zero_and_a_share_runs_to_one():
    assert charts.span([0.2, None, 0.9], "share") == (0, 1)
    assert charts.span([2.0, 10.0]) == (0, 11)
    assert charts.span([-5.0, 5.0]) == (-6, 6)
    assert charts.span([-5.0, -1.0]) == (-5.5, 0)
    assert charts.span([None, math.nan]) == (0, 1)


def test_a_gate_shades_the_side_on_which_it_passes():
    at_least = charts.gate(0.9, 0.8, 0.95, 0.5, "max", "share")
    at_most = charts.gate(0.9, 0.8, 0.95, 0.5, "min", "share")
    assert attributes(at_least, "zone", "x", "width") == [(100, 100)]
    assert attributes(at_most, "zone", "x", "width") == [(0, 100)]
    assert attributes(at_least, "limit", "x1", "x2") == [(100, 100)]
    assert attributes(at_least, "dot", "cx") == [pytest.approx((6 + 0.9 * 188,), abs=0.1)]
    assert attributes(at_least, "interval", "x1", "x2") == [pytest.approx((6 + 0.8 * 188, 6 + 0.95 * 188), abs=0.1)]


def test_a_mark_without_a_value_is_nothing_and_without_an_interval_a_mark():
    assert charts.gate(None, None, None, 0.5, "max") == charts.whisker(math.nan, 0, 1, (0, 1)) == ""
    assert attributes(charts.whisker(0.25, None, None, (0, 1)), "mark", "x1", "x2") == [(26, 26)]
    assert 'class="interval"' not in charts.whisker(0.25, None, 1, (0, 1))
    assert 'class="zone"' not in charts.gate(1.0, None, None, None, "max")


def test_a_few_points_are_all_drawn_where_they_belong():
    curve = charts.curve(rows([1.0, 3.0, 2.0]), LOSS)
    (x1, y1), (x2, y2), (x3, y3) = path(curve.picture, "line")
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11) and y2 < y3 < y1  # upwards is less
    assert y1 - y3 == pytest.approx(y3 - y2, abs=0.11)
    assert charts.LEFT < x1 and x3 <= charts.WIDTH - charts.RIGHT
    assert curve.picture.count("<circle") == 3 and "band" not in curve.picture
    assert curve.legend == [(0, "training", "2")]


def test_many_points_become_their_means_over_a_band():
    points = [(step, float(step % 2)) for step in range(1000)]
    thin = charts.thinned(points)
    assert len(thin) <= 60 and thin[0].step == 8
    assert all(0.4 < point.mean < 0.6 and (point.low, point.high) == (0, 1) for point in thin)
    curve = charts.curve(rows([value for _, value in points]), LOSS)
    assert 'class="band"' in curve.picture and "<circle" not in curve.picture
    assert len(curve.picture) < 5000


def test_a_spike_is_cut_and_does_not_flatten_the_rest():
    values = [float(step % 3) for step in range(600)]
    values[300] = 50.0
    corners = path(charts.curve(rows(values), Panel("Loss", ("loss",))).picture, "band")
    assert min(y for _, y in corners) == charts.TOP


def test_what_is_not_finite_is_a_gap():
    curve = charts.curve(rows([1.0, math.nan, 2.0, 3.0, math.inf]), LOSS)
    assert curve.picture.count('class="line"') == 2
    assert "nan" not in curve.picture and "inf" not in curve.picture
    assert curve.legend == [(0, "training", "3")]


@pytest.mark.parametrize("found", [[], rows([math.nan]), rows([1.0], "other"), [{"loss": 1.0}], rows(["text"])])
def test_rows_without_a_number_have_no_curve(found):
    assert charts.curve(found, LOSS) is None


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.0, 0.0], [-1.0, -1.0], [1e-9, 1e9]])
def test_a_curve_without_extent_or_with_a_huge_one_stays_within_its_picture(values):
    picture = charts.curve(rows(values), LOSS).picture
    for x, y in path(picture, "line"):
        assert 0 <= x <= charts.WIDTH and charts.TOP < y < charts.HEIGHT - charts.BOTTOM
    assert attributes(picture, "up", "y")


def test_the_held_out_line_has_its_colour_where_it_is_alone_too():
    both = [{"step": 0, "loss": 2.0, "validation_loss": 1.5, "validation_loss/chat": 1.0}]
    assert charts.curve(both, LOSS).legend == [
        *((0, "training", "2"), (1, "held out", "1.5"), (2, "held out, chat", "1"))
    ]
    assert charts.curve(rows([1.0], "validation_loss"), LOSS).legend == [(1, "held out", "1")]
    assert '<g class="c1">' in charts.curve(rows([1.0], "validation_loss"), LOSS).picture


def test_a_picture_says_what_it_shows_and_escapes_it():
    picture = charts.curve(rows([3.0, 1.0]), LOSS, '"><script>').picture
    assert 'aria-label="Loss, nats of &#34;&gt;&lt;script&gt;: training from 3 to 1 at step 1"' in picture


@pytest.mark.parametrize("low, high, count", [(0.4, 6.3, (3, 6)), (1e-5, 10, (3, 8)), (0.9, 4.0, (2, 5))])
def test_a_logarithmic_axis_has_a_few_round_ticks(low, high, count):
    found = charts.ticks(charts.Axis(low, high, 0, 100, math.log))
    assert count[0] <= len(found) <= count[1]
    assert all(f"{tick:e}"[0] in "125" for tick in found)


def test_a_loss_that_falls_far_is_logarithmic_and_one_that_can_be_negative_is_not():
    def heights(values):
        (_, top), (_, middle), (_, bottom) = path(charts.curve(rows(values), LOSS).picture, "line")
        assert charts.TOP < top < middle < bottom < charts.HEIGHT - charts.BOTTOM
        return (middle - top) / (bottom - top)

    assert heights([16.0, 4.0, 1.0]) == pytest.approx(0.5, abs=0.01)
    assert heights([16.0, 4.0, -1.0]) == pytest.approx(12 / 17, abs=0.01)
    assert heights([3.0, 2.5, 2.0]) == pytest.approx(0.5, abs=0.01)

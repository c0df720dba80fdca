import math

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from jaxllm import figures
from jaxllm.figures import Panel, Point


def rows(count=100):
    return [
        {
            "step": step,
            "loss": 1 + 4 / step,
            "learning_rate": 1e-3 * step / count,
            "grad_norm": 1.0,
            "tokens_per_second": 7000.0 + step,
            "sample": "some text",
        }
        | ({"validation_loss": 1.1 + 4 / step} if step % 20 == 0 else {})
        for step in range(1, count + 1)
    ]


def axes_of(panel, found):
    axes = Figure().add_subplot()
    figures._draw(axes, panel, figures._series(found, panel.names))
    return axes


def test_a_pretraining_run_becomes_one_png_with_a_panel_for_each_metric_that_has_data(tmp_path):
    figures.curves(rows(), tmp_path / "figures" / "training.png")
    picture = image.imread(tmp_path / "figures" / "training.png")
    width, height = int(figures.WIDTH * figures.DPI), int(figures.HEIGHT * figures.DPI)
    assert picture.shape[:2] == pytest.approx((2 * height, 2 * width), abs=2)  # four panels: no bits per byte, no MFU
    for corner in (
        picture[:height, :width],
        picture[:height, width:],
        picture[height:, :width],
        picture[height:, width:],
    ):
        assert (np.abs(corner[..., :3] - [0, 0x72 / 255, 0xB2 / 255]).max(axis=-1) < 0.02).sum() > 200  # the blue curve


def test_one_panel_is_one_column_wide(tmp_path):
    figures.curves(rows(), tmp_path / "loss.png", figures.PANELS[:1])
    assert image.imread(tmp_path / "loss.png").shape[1] == int(figures.WIDTH * figures.DPI)


def test_curves_hold_the_steps_and_values_of_the_rows():
    loss, validation = axes_of(Panel("Loss", ("loss", "validation_loss")), rows(50)).get_lines()
    np.testing.assert_array_equal(loss.get_xdata(), np.arange(1, 51))
    np.testing.assert_allclose(loss.get_ydata(), 1 + 4 / np.arange(1, 51))
    np.testing.assert_array_equal(validation.get_xdata(), [20, 40])
    assert loss.get_label() == "loss  1.08" and validation.get_label() == "validation loss  1.2"
    assert loss.get_color() != validation.get_color()


def test_patterns_find_metrics_of_later_stages_and_leave_out_text():
    found = [{"step": 1, "kl": 0.1, "reward_std": 0.2, "reward": 0.5, "reward_text": "good"}]
    assert list(figures._series(found, ("reward", "reward*"))) == ["reward", "reward_std"]
    assert figures._series(found, ("loss",)) == {}


def test_nan_and_infinity_leave_a_gap_and_a_metric_without_a_number_is_left_out():
    found = [{"step": s, "loss": v, "norm": math.nan} for s, v in enumerate([2.0, math.nan, math.inf, 1.0])]
    series = figures._series(found, ("loss", "norm"))
    assert list(series) == ["loss"]
    np.testing.assert_array_equal(series["loss"][1], [2.0, np.nan, np.nan, 1.0])


def test_a_run_that_ended_in_nan_can_still_be_drawn(tmp_path):
    found = [{"step": s, "loss": 2.0 if s < 80 else math.nan} for s in range(100)]
    figures.curves(found, tmp_path / "a.png")
    assert axes_of(figures.PANELS[0], found).get_title("right") == "2"


@pytest.mark.parametrize(("value", "scale"), [(0.5, "log"), (0.0, "linear"), (-1.0, "linear")])
def test_a_log_panel_is_linear_when_a_value_is_not_positive(value, scale):
    found = [{"step": 1, "kl": 2.0}, {"step": 2, "kl": value}]
    assert axes_of(Panel("KL", ("kl",), scale="log"), found).get_yscale() == scale


def test_a_panel_with_a_bottom_starts_there_and_shows_its_top():
    low, high = axes_of(Panel("Speed", ("tokens_per_second",), bottom=0), rows()).get_ylim()
    assert low == 0 and high > 7100


def test_smoothing_removes_a_spike_and_keeps_a_ramp_and_the_ends():
    ramp = np.arange(200.0)
    np.testing.assert_allclose(figures._smooth(ramp, 7), ramp)
    spiked = ramp.copy()
    spiked[100] = 1e6
    assert np.abs(figures._smooth(spiked, 7) - ramp).max() < 1
    noisy = np.random.default_rng(0).normal(size=500)
    smooth = figures._smooth(noisy, 9)
    assert smooth.std() < 0.5 * noisy.std() and (smooth[0], smooth[-1]) == (noisy[0], noisy[-1])


def test_smoothing_keeps_gaps_only_where_nothing_is_near():
    values = np.ones(100)
    values[40:60] = np.nan
    smooth = figures._smooth(values, 3)
    assert np.isnan(smooth[47:53]).all() and np.isfinite(smooth[[0, 39, 60, 99]]).all()


def test_nothing_to_draw_names_what_is_there_and_what_is_wanted(tmp_path):
    with pytest.raises(ValueError, match=r"the rows hold \['prize', 'step'\], the panels want \['loss'"):
        figures.curves([{"step": 1, "prize": 1.0}], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"nothing to draw in .*a.png: the rows hold \[\]"):
        figures.curves([], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_ticks_are_plain_numbers():
    ticks = [figures._tick(value, 0) for value in (0.0002, 1.5, 750, 12_000, 3e6)]
    assert ticks == ["0.0002", "1.5", "750", "12k", "3M"]


# ---- measurements ----


class Bin:
    def __init__(self, predicted, *observed):
        self.predicted, self.observed = predicted, observed


def drawn(monkeypatch, draw, *inputs, **options):
    """The axes that a function draws, and the figure."""
    kept = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: kept.append(figure))
    draw(*inputs, "unused.png", **options)
    (figure,) = kept
    return figure.axes[0], figure


def bars(axes):
    """label -> (points, ends of the vertical bars)."""
    found = {}
    for container in axes.containers:
        line, _, collections = container.lines
        points = np.array(line.get_xydata())
        found[container.get_label()] = points, [segment[:, 1] for segment in collections[-1].get_segments()], line
    return found


def test_points_lie_where_they_were_measured_with_their_intervals_and_a_colour_and_a_sign_for_each_label(monkeypatch):
    groups = {"DPO": [Point(1, 0.8, 0.7, 0.85), Point(2, 0.9, 0.8, 0.95, 0.5)], "IPO": [Point(3, 0.6, 0.5, 0.65)]}
    axes, _ = drawn(monkeypatch, figures.scatter, groups, title="Win rate", across="KL", level=0.5)
    found = bars(axes)
    assert list(found) == ["DPO", "IPO"]
    for label, points in groups.items():
        np.testing.assert_allclose(found[label][0], [point[:2] for point in points])
        np.testing.assert_allclose(found[label][1], [point[2:4] for point in points])
    dpo, ipo = found["DPO"][2], found["IPO"][2]
    assert dpo.get_color() != ipo.get_color() and dpo.get_marker() != ipo.get_marker()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["DPO", "IPO"]
    assert (axes.get_title("left"), axes.get_xlabel()) == ("Win rate", "KL")
    assert any(line.get_linestyle() == "--" and set(line.get_ydata()) == {0.5} for line in axes.get_lines())
    horizontal = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([segment[:, 0] for segment in horizontal], [[1, 1], [1.5, 2.5]])


def test_points_that_are_not_finite_are_left_out_and_one_group_needs_no_legend(monkeypatch):
    groups = {"a": [Point(1, 0.5, 0.4, 0.6), Point(math.nan, 0.5, 0.4, 0.6)], "b": [Point(1, math.inf, 0, 1)]}
    axes, _ = drawn(monkeypatch, figures.scatter, groups, title="", across="")
    assert list(bars(axes)) == ["a"] and len(bars(axes)["a"][0]) == 1 and axes.get_legend() is None


def test_more_labels_than_colours_are_drawn_too(monkeypatch):
    groups = {str(number): [Point(number, 0.5, 0.4, 0.6)] for number in range(9)}
    axes, _ = drawn(monkeypatch, figures.scatter, groups, title="", across="")
    assert len(bars(axes)) == 9


def test_a_calibration_curve_has_its_bins_and_the_diagonal(monkeypatch):
    groups = {"one": [Bin(0.55, 0.5, 0.3, 0.7), Bin(0.9, 0.8, 0.7, 0.9)], "empty": []}
    axes, _ = drawn(monkeypatch, figures.calibration, groups)
    ((points, ends, line),) = bars(axes).values()
    np.testing.assert_allclose(points, [[0.55, 0.5], [0.9, 0.8]])
    np.testing.assert_allclose(ends, [[0.3, 0.7], [0.7, 0.9]])
    assert line.get_linestyle() == "-" and axes.get_ylim()[0] < 0.3 < 1 < axes.get_ylim()[1]
    diagonal = next(line for line in axes.get_lines() if line.get_linestyle() == "--")
    assert diagonal.get_slope() == 1 and diagonal.get_xy1() == (0.5, 0.5)


def test_a_ladder_has_a_rung_for_each_label_from_the_top_down(monkeypatch):
    values = {"first": (100.4, 50, 150), "second": (-3, -20, 20), "third": (-90, -150, -50)}
    axes, figure = drawn(monkeypatch, figures.ladder, values, title="Elo")
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(values) and axes.yaxis_inverted()
    lines = axes.get_lines()
    for place, (value, low, high) in enumerate(values.values()):
        np.testing.assert_allclose(lines[2 * place].get_xydata(), [[low, place], [high, place]])
        np.testing.assert_allclose(lines[2 * place + 1].get_xydata(), [[value, place]])
    assert [text.get_text() for text in axes.texts] == ["100", "-3", "-90"]
    _, taller = drawn(monkeypatch, figures.ladder, dict.fromkeys(range(9), (0, -1, 1)), title="")
    assert taller.get_figheight() > figure.get_figheight()


def test_measurements_become_pngs_and_nothing_to_draw_is_refused(tmp_path):
    figures.scatter({"a": [Point(1, 0.5, 0.4, 0.6)]}, tmp_path / "new" / "a.png", title="", across="")
    figures.calibration({"a": [Bin(0.5, 0.5, 0.4, 0.6)]}, tmp_path / "new" / "b.png")
    figures.ladder({"a": (1, 0, 2)}, tmp_path / "new" / "c.png", title="")
    assert all(image.imread(path).shape[1] == int(figures.WIDTH * figures.DPI) for path in (tmp_path / "new").iterdir())
    with pytest.raises(ValueError, match=r"nothing to draw in .*d.png: no point of \['a'\] is finite"):
        figures.scatter({"a": [Point(math.nan, 0.5, 0.4, 0.6)]}, tmp_path / "d.png", title="", across="")
    with pytest.raises(ValueError, match=r"nothing to draw in .*d.png: no bin in \['a'\]"):
        figures.calibration({"a": []}, tmp_path / "d.png")
    with pytest.raises(ValueError, match="nothing to draw in .*d.png: no value"):
        figures.ladder({}, tmp_path / "d.png", title="")
    assert not (tmp_path / "d.png").exists()


def test_metrics_are_drawn_against_the_root_of_another_in_its_order(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Axes, "plot", lambda self, x, y, **how: drawn.append((list(x), list(y), how["label"])))
    monkeypatch.setattr(figures.Axes, "legend", lambda self, **how: None)
    rows = [
        {"step": 1, "kl": 9.0, "gold": 1.0},
        {"step": 2, "kl": 4.0, "gold": 2.0},
        {"step": 2, "validation_loss": 1.0},
    ]
    figures.against({"free": [rows, rows]}, tmp_path / "over.png", names=["gold"], root_of="kl")
    assert drawn == [([2.0, 3.0], [2.0, 1.0], "free"), ([2.0, 3.0], [2.0, 1.0], None)]
    with pytest.raises(ValueError, match="nothing to draw of 'free': no row of one of its runs has both loss and kl"):
        figures.against({"free": [rows]}, tmp_path / "over.png", names=["loss"], root_of="kl")


# ---- bars ----

BARS = {
    "accuracy": {"one": {"all": (0.5, 0.4, 0.6), "qa": (0.9, None, None)}, "two": {"all": (0.2, 0.1, 0.3)}},
    "bleu": {"one": {"all": (None, None, None)}},
    "rouge l": {"one": {"all": (0.25, 0.2, 0.3)}},
}


def test_bars_have_a_panel_for_each_metric_with_a_value(tmp_path):
    figures.bars(BARS, tmp_path / "figures" / "bars.png")
    shape = image.imread(tmp_path / "figures" / "bars.png").shape
    assert shape[:2] == pytest.approx((figures.HEIGHT * figures.DPI, 2 * figures.WIDTH * figures.DPI), abs=2)
    with pytest.raises(ValueError, match="nothing to draw in .*: no value among"):
        figures.bars({"bleu": BARS["bleu"]}, tmp_path / "none.png")


def test_a_label_with_dollars_is_drawn_as_it_is_spelled(tmp_path):
    label = r"$\bad{$"
    for value in (1.0, 2000.0):
        groups = {label: {label: (value, value, value)}, f"{label} too": {label: (1.0, 1.0, 1.0)}}
        figures.bars({label: groups}, tmp_path / "bars.png")
        figures.ladder({label: (value, value, value)}, tmp_path / "ladder.png", title=label)
    rows = [[{"step": 1, "loss": 2.0, label: 1.0}], [{"step": 1, "loss": 2.0, label: 3.0}]]
    figures.comparison({label: rows}, tmp_path / "comparison.png", names=["loss", label])


def test_a_bar_is_as_long_as_its_value_with_its_interval_and_runs_do_not_cover_each_other():
    axes = Figure().add_subplot()
    figures._bar_panel(axes, "accuracy", BARS["accuracy"])
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.9, 0.2]
    assert [line.get_xdata().tolist() for line in axes.get_lines()] == [[0.4, 0.6], [0.9, 0.9], [0.1, 0.3]]
    spans = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches)
    assert all(one[1] <= other[0] for one, other in zip(spans, spans[1:], strict=False))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all", "qa"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
    assert axes.patches[0].get_facecolor() == axes.patches[1].get_facecolor() != axes.patches[2].get_facecolor()

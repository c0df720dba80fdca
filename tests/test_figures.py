import math

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from jaxllm import figures
from jaxllm.figures import Panel


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
    with pytest.raises(ValueError, match=r"the rows hold \['reward', 'step'\], the panels want \['loss'"):
        figures.curves([{"step": 1, "reward": 1.0}], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"nothing to draw in .*a.png: the rows hold \[\]"):
        figures.curves([], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_ticks_are_plain_numbers():
    ticks = [figures._tick(value, 0) for value in (0.0002, 1.5, 750, 12_000, 3e6)]
    assert ticks == ["0.0002", "1.5", "750", "12k", "3M"]

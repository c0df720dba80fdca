"""Pictures as PNG: curves of a run, drawn from the rows of its ``metrics.jsonl``, and measurements with intervals.

A panel without data is left out.
"""

import dataclasses
import fnmatch
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

# Okabe and Ito, "Color Universal Design" (2008), without yellow: told apart under every common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT = "#333333", "#DDDDDD"
WIDTH, HEIGHT, DPI = 5.6, 3.2, 130  # of one panel: inches, inches, dots per inch
NOISY = 60  # points beyond which a curve is drawn smoothed over its own pale self

Series = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (steps, values)
Groups = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]  # label -> the rows of each of its runs


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes. ``names`` are metric names or patterns (``"reward*"``), ``scale`` is "linear" or "log".

    ``bottom`` fixes the lower end of a linear axis: 0 where a ratio of heights should be read as such.
    """

    title: str
    names: tuple[str, ...]
    scale: str = "linear"
    bottom: float | None = None


class Point(NamedTuple):
    """A measurement: y between the ends of its interval, at x, whose standard error may be known."""

    x: float
    y: float
    low: float
    high: float
    x_error: float = 0.0


PANELS = (
    Panel(
        "Loss, nats",
        ("loss", "validation_loss*", "average_validation_loss", "validation_pair_loss"),
        scale="log",
    ),
    Panel("Bits per byte", ("*bits_per_byte*",), scale="log"),
    Panel("Divergence from the teacher, nats", ("jsd", "validation_jsd*"), scale="log"),
    Panel("Answers to held-out prompts", ("validation_rouge_l", "validation_exact_match", "validation_answers_ended")),
    Panel("Pairs that are told apart", ("accuracy", "validation_accuracy*")),
    Panel("Margin of the chosen answer", ("margin", "validation_margin")),
    Panel("Log-ratio to the reference, nats", ("*chosen_log_ratio", "*rejected_log_ratio")),
    Panel("KL to the reference on its own answers, nats", ("validation_kl",), bottom=0),
    Panel("Reward", ("reward", "validation_reward")),
    Panel("Reward by its parts", ("reward/*", "validation_reward/*")),
    Panel("Tokens of a completion", ("*completion_tokens", "completion_tokens_max"), bottom=0),
    Panel("Completions cut, groups without a lesson", ("clipped_fraction", "undecided"), bottom=0),
    Panel("Entropy, nats per token", ("entropy",), bottom=0),
    Panel("KL to the reference, nats per completion", ("kl",)),
    Panel("Log-probability, sampler against trainer", ("rollout_train_logp_diff",), scale="log"),
    Panel("Tokens whose ratio is clipped", ("clipped_high", "clipped_low"), bottom=0),
    Panel("Variance that the critic explains", ("explained_variance",)),
    Panel("Seconds of a step", ("rollout_seconds", "reward_seconds", "assess_seconds", "update_seconds"), bottom=0),
    Panel("Learning rate", ("learning_rate",), bottom=0),
    Panel("Gradient norm", ("grad_norm",), scale="log"),
    Panel("Tokens per second", ("tokens_per_second",), bottom=0),
    Panel("Model FLOP utilisation", ("mfu",), bottom=0),
)


def curves(rows: Sequence[Mapping[str, Any]], path: Any, panels: Sequence[Panel] = PANELS) -> None:
    """Draw the ``panels`` that have data into one PNG at ``path``, against ``row["step"]``.

    Non-finite values leave a gap. Raises ``ValueError`` if no panel has a number to show.
    """
    found = [(panel, _series(rows, panel.names)) for panel in panels]
    found = [(panel, series) for panel, series in found if series]
    if not found:
        wanted = [name for panel in panels for name in panel.names]
        present = sorted({name for row in rows for name in row})
        raise ValueError(f"nothing to draw in {path}: the rows hold {present}, the panels want {wanted}")
    columns = min(2, len(found))
    lines = math.ceil(len(found) / columns)
    figure = _figure(columns, lines)
    for index, (panel, series) in enumerate(found):
        _draw(figure.add_subplot(lines, columns, index + 1), panel, series)
    _save(figure, path)


def comparison(groups: Groups, path: Any, *, names: Sequence[str]) -> None:
    """Draw metrics of several groups of runs into a PNG, a panel each: the mean of a group, and a band from least to
    greatest.

    The runs of a group differ in their seed. Raises ``ValueError`` where they have a metric at different steps.
    """
    figure = _figure(len(names), 1)
    for place, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), place + 1)
        for (label, runs), colour in zip(groups.items(), itertools.cycle(COLOURS), strict=False):
            steps, values = aligned(runs, name)
            mean = values.mean(axis=0)
            axes.plot(steps, mean, color=colour, linewidth=1.8, label=f"{label}  {mean[-1]:.4g}")
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        _dress(axes, name.replace("_", " "))
        axes.legend(edgecolor="none", fontsize=8, labelcolor=INK)
    _save(figure, path)


def against(groups: Groups, path: Any, *, names: Sequence[str], root_of: str) -> None:
    """Draw metrics of groups of runs against the square root of another into a PNG: a panel each, a line for each run.

    Of a KL the root is taken, for rewards are nearly straight in it (Gao et al. 2023, arXiv:2210.10760). Raises
    ``ValueError`` where a run has no row with both.
    """
    figure = _figure(len(names), 1)
    for place, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), place + 1)
        for (label, runs), colour in zip(groups.items(), itertools.cycle(COLOURS), strict=False):
            courses = [_by_root(rows, name, root_of, label) for rows in runs]
            for course, named in zip(courses, itertools.chain([label], itertools.repeat(None)), strict=False):
                axes.plot(*course, color=colour, linewidth=1.6, alpha=0.7, label=named)
        _dress(axes, name.replace("_", " "), f"square root of {root_of.replace('_', ' ')}")
        axes.legend(edgecolor="none", fontsize=8, labelcolor=INK)
    _save(figure, path)


def scatter(
    groups: Mapping[str, Sequence[Point]], path: Any, *, title: str, across: str, level: float | None = None
) -> None:
    """Draw points with their intervals into a PNG, a colour and a sign for each label; ``across`` says what x is.

    ``level`` is a y to compare with, drawn as a broken line. A group without a finite point is left out; raises
    ``ValueError`` where all are.
    """
    found = {label: [point for point in points if _is_finite(point)] for label, points in groups.items()}
    if not any(found.values()):
        raise ValueError(f"nothing to draw in {path}: no point of {sorted(groups)} is finite")
    figure = _figure(1, 1)
    axes = figure.add_subplot()
    _dress(axes, title, across)
    if level is not None:
        axes.axhline(level, color=INK, linewidth=0.8, linestyle="--")
    _points(axes, {label: points for label, points in found.items() if points})
    axes.margins(0.08)
    axes.xaxis.set_major_formatter(_tick)
    axes.yaxis.set_major_formatter(_tick)
    _save(figure, path)


def calibration(groups: Mapping[str, Sequence[Any]], path: Any) -> None:
    """Draw how often verdicts of like confidence are right into a PNG: the nearer to the diagonal the better.

    A group holds bins with their ``predicted`` probability and the ``observed`` (share, low, high). Raises
    ``ValueError`` where there is none.
    """
    if not any(groups.values()):
        raise ValueError(f"nothing to draw in {path}: no bin in {sorted(groups)}")
    figure = _figure(1, 1)
    axes = figure.add_subplot()
    _dress(axes, "Share that is right", "predicted probability of being right")
    axes.axline((0.5, 0.5), slope=1, color=INK, linewidth=0.8, linestyle="--")
    axes.set_xlim(0.48, 1.02)
    found = {label: [Point(each.predicted, *each.observed) for each in bins] for label, bins in groups.items() if bins}
    _points(axes, found, line="-")
    axes.set_ylim(min(0.45, *(point.low - 0.02 for points in found.values() for point in points)), 1.02)
    _save(figure, path)


def ladder(values: Mapping[str, Sequence[float]], path: Any, *, title: str) -> None:
    """Draw each label's (value, low, high) into a PNG, one below the other in the given order.

    Raises ``ValueError`` where there is none.
    """
    if not values:
        raise ValueError(f"nothing to draw in {path}: no value")
    figure = _figure(1, 1)
    figure.set_figheight(0.9 + 0.28 * len(values))
    axes = figure.add_subplot()
    _dress(axes, title, "")
    places = range(len(values))
    for place, (value, low, high) in zip(places, values.values(), strict=True):
        axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=1.8, alpha=0.5, solid_capstyle="butt")
        axes.plot([value], [place], color=COLOURS[0], marker="o", markersize=6)
        axes.annotate(
            f"{value:.0f}", (value, place), (0, 6), textcoords="offset points", ha="center", color=INK, fontsize=8
        )
    axes.set_yticks(list(places), list(values))
    axes.set_ylim(len(values) - 0.5, -0.7)
    axes.margins(x=0.06)
    _save(figure, path)


def bars(panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]], path: Any) -> None:
    """Draw measures with their intervals into a PNG: title of a panel -> run -> group -> (value, low, high).

    A bar for each group and run, runs in their own colours; a value that is None has none. Raises ``ValueError`` where
    nothing has a value.
    """
    found = {title: runs for title, runs in panels.items() if any(_known(groups) for groups in runs.values())}
    if not found:
        raise ValueError(f"nothing to draw in {path}: no value among {list(panels)}")
    columns = min(2, len(found))
    figure = _figure(columns, math.ceil(len(found) / columns))
    for place, (title, runs) in enumerate(found.items()):
        _bar_panel(figure.add_subplot(math.ceil(len(found) / columns), columns, place + 1), title, runs)
    _save(figure, path)


def aligned(runs: Sequence[Sequence[Mapping[str, Any]]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values of the metric as [runs, steps]); ``ValueError`` where the runs have it at different steps."""
    found = [{row["step"]: row[name] for row in rows if name in row} for rows in runs]
    steps = sorted(found[0])
    if not steps or any(sorted(each) != steps for each in found):
        raise ValueError(
            f"{name}: the runs have it at steps {[sorted(each) for each in found]}; compare like with like"
        )
    return np.array(steps), np.array([[each[step] for step in steps] for each in found])


def _by_root(rows: Sequence[Mapping[str, Any]], name: str, root_of: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    """(roots in order, the metric there, smoothed)."""
    found = sorted((max(0.0, row[root_of]) ** 0.5, row[name]) for row in rows if {name, root_of} <= row.keys())
    if not found:
        raise ValueError(f"nothing to draw of {label!r}: no row of one of its runs has both {name} and {root_of}")
    roots, values = np.array(found).T
    return roots, _smooth(values, max(1, len(values) // 10))


def _figure(columns: int, lines: int) -> Figure:
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * lines), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Any) -> None:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a label is a name that somebody gave, whatever dollars it has
    figure.savefig(path)


def _series(rows: Sequence[Mapping[str, Any]], patterns: Sequence[str]) -> Series:
    """Every metric that matches a pattern and has a finite number, in the order of the patterns."""
    present = dict.fromkeys(name for row in rows for name in row)
    names = dict.fromkeys(name for pattern in patterns for name in present if fnmatch.fnmatchcase(name, pattern))
    series = {}
    for name in names:
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        steps, values = np.array(points, float).reshape(-1, 2).T
        if np.isfinite(values).any():
            series[name] = (steps, np.where(np.isfinite(values), values, np.nan))
    return series


def _draw(axes: Axes, panel: Panel, series: Series) -> None:
    for (name, (steps, values)), colour in zip(series.items(), itertools.cycle(COLOURS), strict=False):
        _curve(axes, steps, values, colour, label=f"{name.replace('_', ' ')}  {_last(values):.4g}")
    _scale(axes, panel, np.concatenate([values for _, values in series.values()]))
    _dress(axes, panel.title)
    if len(series) > 1:
        axes.legend(edgecolor="none", fontsize=8, labelcolor=INK)
    else:
        axes.set_title(
            f"{_last(*[values for _, values in series.values()]):.4g}", loc="right", color=COLOURS[0], fontsize=9
        )


def _points(axes: Axes, groups: Mapping[str, Sequence[Point]], line: str = "") -> None:
    """Points with bars; a legend where there are several groups. Signs differ too, where colours do not print."""
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    for (label, points), (colour, marker) in zip(groups.items(), looks, strict=False):
        x, y, low, high, x_error = np.array(points, float).T
        bars = dict(fmt=marker + line, color=colour, ecolor=(colour, 0.45), elinewidth=1.2, linewidth=1.2, markersize=5)
        axes.errorbar(x, y, yerr=[y - low, high - y], xerr=x_error if x_error.any() else None, label=label, **bars)
    if len(groups) > 1:
        axes.legend(edgecolor="none", fontsize=8, labelcolor=INK)


def _known(groups: Mapping[str, Sequence[float | None]]) -> dict[str, list[float]]:
    """Group -> (value, low, high) of those that have a value; without an interval, its ends are the value."""
    return {
        group: [measure[0] if each is None else each for each in measure[:3]]
        for group, measure in groups.items()
        if measure[0] is not None
    }


def _bar_panel(axes: Axes, title: str, runs: Mapping[str, Mapping[str, Sequence[float | None]]]) -> None:
    _dress(axes, title, "")
    names = list(dict.fromkeys(group for groups in runs.values() for group in groups))
    thick = 0.7 / len(runs)
    for number, ((label, groups), colour) in enumerate(zip(runs.items(), itertools.cycle(COLOURS), strict=False)):
        for name, (value, low, high) in _known(groups).items():
            y = names.index(name) + thick * (number - (len(runs) - 1) / 2)
            axes.barh(y, value, 0.9 * thick, color=colour, label=label)
            axes.plot([low, high], [y, y], color=INK, linewidth=1.4)
            axes.annotate(f"{value:.4g}", (high, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.14)
    axes.xaxis.set_major_formatter(_tick)
    if len(runs) > 1:
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys(), edgecolor="none", fontsize=7, labelcolor=INK, loc="lower right")


def _is_finite(point: Point) -> bool:
    return all(map(math.isfinite, point))


def _dress(axes: Axes, title: str, across: str = "step") -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=10, fontweight="bold")
    axes.set_xlabel(across, color=INK, fontsize=8)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, length=0, which="both")
    axes.spines[:].set_visible(False)


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    if len(values) > NOISY:
        width = len(values) // NOISY + 1
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
        axes.plot(steps, _smooth(values, width), color=colour, linewidth=1.8, label=label)
    else:
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)


def _scale(axes: Axes, panel: Panel, values: np.ndarray) -> None:
    """A log axis holds only positive numbers: with others the panel is linear. Ticks are plain numbers."""
    axes.xaxis.set_major_formatter(_tick)
    low, high = np.nanmin(values), np.nanmax(values)
    if panel.scale == "log" and low > 0:
        digits = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 3) if high < 1000 * low else (1,)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=digits))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    elif panel.bottom is not None and high > panel.bottom:
        axes.set_ylim(panel.bottom, high + 0.08 * (high - panel.bottom))
    axes.yaxis.set_major_formatter(_tick)


def _tick(value: float, _: int) -> str:
    return ticker.EngFormatter(sep="")(value) if abs(value) >= 1000 else f"{value:.6g}"


def _last(values: np.ndarray) -> float:
    return values[np.isfinite(values)][-1]


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The running median, then the running mean of that: a spike stays in the pale curve, a ramp stays a ramp."""
    return _running(np.mean, _running(np.median, values, width), width)


def _running(average: Callable[[np.ndarray], float], values: np.ndarray, width: int) -> np.ndarray:
    """The average of the finite values up to ``width`` away, as many on either side: the two ends stay as they are."""
    averaged = np.full(len(values), np.nan)
    for i in range(len(values)):
        reach = min(width, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        if np.isfinite(window).any():
            averaged[i] = average(window[np.isfinite(window)])
    return averaged

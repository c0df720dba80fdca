"""Numbers as people read them, and small pictures as inline SVG: what the report is drawn with.

Pure functions. Whatever is written into markup is escaped; colours are classes, so that the page decides on them in
light and in dark.
"""

import fnmatch
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib import ticker

from jaxllm.figures import COLOURS, NOISY, Panel

UNKNOWN = "–"
LETTERS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")  # of bytes and FLOPs
COUNTS = ("", "k", "M", "B", "T")  # of tokens and documents
WIDTH, HEIGHT = 320, 170  # of a curve: what it is drawn in, not how wide it is shown
LEFT, RIGHT, TOP, BOTTOM = 42, 16, 8, 22
HELD_OUT = "validation_"  # with which a metric begins that is not of what was trained on
DOTTED = 25  # points up to which each has a dot

PANELS = (
    Panel("Loss, nats", ("loss", "validation_loss", "validation_loss/*", "validation_pair_loss"), "log"),
    Panel("Reward", ("reward", "validation_reward")),
    Panel(
        "Right answers, share",
        ("reward/accuracy", "validation_reward/accuracy", "validation_exact_match"),
        bottom=0,
    ),
    Panel("Pairs told apart, share", ("accuracy", "validation_accuracy")),
    Panel("KL to the reference, nats of an answer", ("kl", "validation_kl"), bottom=0),
    Panel(
        "Length of an answer, tokens",
        ("completion_tokens", "validation_completion_tokens", "validation_sampled_tokens"),
        bottom=0,
    ),
)
LOGARITHMIC = 4  # how many times its least value the greatest of a log panel is, or it is drawn linear


class Point(NamedTuple):
    """Neighbouring rows in one: their mean step, the mean of their values, the least and the greatest."""

    step: float
    mean: float
    low: float
    high: float


class Curve(NamedTuple):
    """A panel that has data. legend: (number of the colour, name, last value) of each line."""

    picture: Markup
    legend: list[tuple[int, str, str]]


class Axis(NamedTuple):
    """Values from low to high onto pixels from start to end."""

    low: float
    high: float
    start: float
    end: float
    bend: Callable[[float], float] = float

    def __call__(self, value: float) -> float:
        """Where the value is drawn; one beyond the axis, at its end."""
        low, high = self.bend(self.low), self.bend(self.high)
        value = self.bend(min(max(value, self.low), self.high))
        return self.start + (value - low) / ((high - low) or 1) * (self.end - self.start)


# ---- numbers ----


def known(value: Any) -> float | None:
    """The number, or None for what is none: null, text, NaN, an infinity."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def number(value: Any, unit: str = "") -> str:
    """Three digits; a "share" in percent; a dash for what is not known.

    >>> number(0.8625, "share"), number(-0.01234), number(20480)
    ('86.2 %', '−0.0123', '20,480')
    """
    value = known(value)
    if value is None:
        return UNKNOWN
    if unit == "share":
        return f"{100 * value:.1f}".removesuffix(".0").replace("-", "−") + "\u00a0%"
    if abs(value) >= 999.5:
        return f"{value:,.0f}".replace("-", "−") if abs(value) < 1e5 else amount(value)
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.3g}".replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")


def interval(low: Any, high: Any, unit: str = "") -> str:
    """ "81.2 to 90 %"; empty where an end is not known."""
    if known(low) is None or known(high) is None:
        return ""
    return f"{number(low, unit).removesuffix(chr(0xA0) + '%')} to {number(high, unit)}"


def amount(value: Any, letters: Sequence[str] = LETTERS) -> str:
    """Three digits and a letter for thousands, millions and so on.

    >>> amount(1.2e13), amount(410_000), amount(None)
    ('12 T', '410 k', '–')
    """
    value = known(value)
    if value is None:
        return UNKNOWN
    for letter in letters:
        if abs(value) < 999.5 or letter == letters[-1]:
            break
        value /= 1000
    digits = f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
    return f"{digits}\u00a0{letter}".rstrip("\u00a0").replace("-", "−")


def duration(seconds: Any) -> str:
    """
    >>> duration(3.21), duration(71.2), duration(7500)
    ('3.2 s', '1 min 11 s', '2 h 5 min')
    """
    seconds = known(seconds)
    if seconds is None:
        return UNKNOWN
    if seconds < 9.95:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((place for place, (size, _) in enumerate(parts) if size), 2)
    return " ".join(f"{size}\u00a0{word}" for size, word in parts[first : first + 2] if size)


# ---- a value on a line ----


def whisker(value: Any, low: Any, high: Any, span: tuple[float, float]) -> Markup:
    """A mark with its interval on a line from one end of ``span`` to the other; empty where there is no value."""
    value, low, high = map(known, (value, low, high))
    if value is None:
        return Markup("")
    at = Axis(*span, 2, 98)
    mark = _line("mark", at(value), 0, at(value), 12)
    # As wide as there is room, never higher: the page keeps the strokes as they are.
    return _svg("whisker", 100, 12, _line("track", 0, 6, 100, 6) + _interval(at, low, high, 6) + mark, ratio="none")


def gate(value: Any, low: Any, high: Any, threshold: Any, best: str, unit: str = "") -> Markup:
    """A value with its interval beside its threshold; the side on which it passes is shaded. Empty without a value."""
    value, low, high, threshold = map(known, (value, low, high, threshold))
    if value is None:
        return Markup("")
    at = Axis(*span([value, low, high, threshold], unit), 6, 194)
    parts = _line("track", 0, 12, 200, 12)
    if threshold is not None:
        limit = at(threshold)
        start, end = (0, limit) if best == "min" else (limit, 200)
        zone = Markup('<rect class="zone" x="{}" y="3" width="{}" height="18"/>').format(_px(start), _px(end - start))
        parts = zone + parts + _line("limit", limit, 1, limit, 23)
    dot = Markup('<circle class="dot" cx="{}" cy="12" r="5"/>').format(_px(at(value)))
    return _svg("threshold", 200, 24, parts + _interval(at, low, high, 12) + dot)


def span(values: Iterable[Any], unit: str | None = "") -> tuple[float, float]:
    """The ends of an axis that holds 0 and the values with some room; a share's runs to 1 at least."""
    found = [value for value in map(known, values) if value is not None]
    low, high = min([0.0, *found]), max([0.0, *found])
    if unit == "share":
        return low, max(1.0, high)
    room = 0.1 * (high - low) or 1.0
    return low - room * (low < 0), high + room * (high > 0 or low == 0)


def _interval(at: Axis, low: float | None, high: float | None, y: float) -> Markup:
    return Markup("") if low is None or high is None else _line("interval", at(low), y, at(high), y)


# ---- curves ----


def curve(rows: Sequence[Mapping[str, Any]], panel: Panel, of: str = "") -> Curve | None:
    """The panel, drawn from the rows of a ``metrics.jsonl``; None where they hold no finite number for it.

    ``of`` says whose they are, to those who do not see the picture.
    """
    lines = {name: thinned(points) for name, points in series(rows, panel.names).items()}
    if not lines:
        return None
    points = [point for each in lines.values() for point in each if math.isfinite(point.mean)]
    across, up = _across(points), _up(panel, points)
    # What is held out has the second colour even where it is alone.
    first = int(next(iter(lines)).startswith(HELD_OUT))
    legend = [
        (place, _named(name, panel.names[0]), number(_last(each).mean))
        for place, (name, each) in enumerate(lines.items(), first)
    ]
    # What is trained on is drawn last, over the others.
    drawn = [_drawn(each, across, up, place) for place, each in enumerate(lines.values(), first)]
    said = f"{panel.title} of {of}: " + "; ".join(
        f"{name} from {number(_first(each).mean)} to {last} at step {number(_last(each).step)}"
        for (_, name, last), each in zip(legend, lines.values(), strict=True)
    )
    return Curve(_svg("curve", WIDTH, HEIGHT, _grid(across, up) + Markup("").join(reversed(drawn)), said), legend)


def series(rows: Sequence[Mapping[str, Any]], patterns: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """name -> (step, value) of each metric that matches a pattern, in their order; NaN where it was not finite."""
    present = dict.fromkeys(name for row in rows for name in row)
    names = dict.fromkeys(name for pattern in patterns for name in present if fnmatch.fnmatchcase(name, pattern))
    found = {}
    for name in names:
        numbers = [(row.get("step"), row[name]) for row in rows if isinstance(row.get(name), int | float)]
        points = [(step, math.nan if known(y) is None else float(y)) for step, y in numbers if known(step) is not None]
        if any(math.isfinite(y) for _, y in points):
            found[name] = points
    return found


def thinned(points: Sequence[tuple[float, float]], most: int = NOISY) -> list[Point]:
    """At most so many points, each of as many neighbours; one of whom none is finite is NaN: a gap."""
    width = math.ceil(len(points) / most)
    made = []
    for start in range(0, len(points), width):
        group = points[start : start + width]
        values = [y for _, y in group if math.isfinite(y)] or [math.nan]
        made.append(Point(fmean(step for step, _ in group), fmean(values), min(values), max(values)))
    return made


def _across(points: Sequence[Point]) -> Axis:
    steps = [point.step for point in points]
    return Axis(min(steps), max(steps), LEFT + 6, WIDTH - RIGHT)


def _up(panel: Panel, points: Sequence[Point]) -> Axis:
    """Made for the means: a single spike is cut, and does not flatten all the rest."""
    low, high = min(point.mean for point in points), max(point.mean for point in points)
    if panel.scale == "log" and low > 0 and high > LOGARITHMIC * low:
        return Axis(low / 1.08, high * 1.08, HEIGHT - BOTTOM, TOP, math.log)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low = low - room if panel.bottom is None or low < panel.bottom else panel.bottom
    return Axis(low, high + room, HEIGHT - BOTTOM, TOP)


def ticks(axis: Axis) -> list[float]:
    """Round numbers on the axis: three to six."""
    if axis.bend is math.log:
        subs = (1, 2, 5) if axis.high < 100 * axis.low else (1,)
        found = ticker.LogLocator(subs=subs).tick_values(axis.low, axis.high)
    else:
        found = ticker.MaxNLocator(nbins=4, steps=[1, 2, 5, 10]).tick_values(axis.low, axis.high)
    return [float(value) for value in found if axis.low <= value <= axis.high]


def _grid(across: Axis, up: Axis) -> Markup:
    parts = []
    for value in ticks(up):
        parts.append(_line("grid", LEFT, up(value), WIDTH - RIGHT, up(value)))
        parts.append(_text("up", LEFT - 6, up(value) + 4, number(value)))
    for value in ticks(across):
        parts.append(_text("across", across(value), HEIGHT - 5, number(value)))
    return Markup("").join(parts)


def _drawn(points: Sequence[Point], across: Axis, up: Axis, place: int) -> Markup:
    """The line of the means, over the band from the least to the greatest; dots where there are few."""
    parts = []
    for finite, group in itertools.groupby(points, key=lambda point: math.isfinite(point.mean)):
        if finite:
            run = list(group)
            edge = [(p.step, p.high) for p in run] + [(p.step, p.low) for p in reversed(run)]
            if any(p.low < p.high for p in run):
                parts.append(_path("band", edge, across, up))
            parts.append(_path("line", [(p.step, p.mean) for p in run], across, up))
            if len(points) <= DOTTED or len(run) == 1:
                parts += [_dot(across(p.step), up(p.mean)) for p in run]
    return Markup('<g class="c{}">{}</g>').format(place % len(COLOURS), Markup("").join(parts))


def _first(points: Sequence[Point]) -> Point:
    return next(point for point in points if math.isfinite(point.mean))


def _last(points: Sequence[Point]) -> Point:
    return _first(points[::-1])


def _named(name: str, first: str) -> str:
    """What a metric is beside the first of its panel: beside "loss", "validation_loss/chat" is "held out, chat"."""
    base = name.removeprefix(HELD_OUT)
    rest = base.removeprefix(first).strip("/").replace("_", " ").replace("/", ", ")
    return ", ".join(["training" if base == name else "held out", *([rest] if rest else [])])


# ---- SVG ----


def _svg(kind: str, width: int, height: int, inside: Markup, said: str = "", ratio: str = "xMidYMid") -> Markup:
    """One that says nothing repeats the numbers beside it, and is hidden from those who listen."""
    heard = Markup('role="img" aria-label="{}"').format(said) if said else Markup('aria-hidden="true"')
    start = Markup('<svg class="{}" viewBox="0 0 {} {}" preserveAspectRatio="{}" ').format(kind, width, height, ratio)
    return Markup("{}{}>{}</svg>").format(start, heard, inside)


def _path(kind: str, points: Sequence[tuple[float, float]], across: Axis, up: Axis) -> Markup:
    where = "L".join(f"{_px(across(x))} {_px(up(y))}" for x, y in points)
    return Markup('<path class="{}" d="M{}"/>').format(kind, where)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    ends = (_px(value) for value in (x1, x2, y1, y2))
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(kind, *ends)


def _dot(x: float, y: float) -> Markup:
    return Markup('<circle cx="{}" cy="{}" r="2.6"/>').format(_px(x), _px(y))


def _text(kind: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, _px(x), _px(y), text)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")

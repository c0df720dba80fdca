"""The report of a pipeline: one HTML page that holds all it shows and asks nothing of a network.

Plain JSON in, text out; any number may be None. What the page says is in ``report.html.jinja``, which escapes whatever
it is given; here is only what is counted, compared and spelled for it.
"""

import functools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxllm.figures import COLOURS
from jaxllm.pipeline import charts
from jaxllm.pipeline.charts import COUNTS, Curve, amount, duration, interval, known, number
from jaxllm.pipeline.transcript import telling, transcript

Values = Mapping[str, Any]
View = dict[str, Any]

UNITS = {"share": "", "number": "", None: ""}  # not said: a share's is the percent sign
CHANGES = {  # how a number differs from the stage before -> its sign, what the sign means
    "better": ("▲", "better than before the stage"),
    "worse": ("▼", "worse than before the stage"),
    "same": ("≈", "no difference that can be told from chance"),
}
GATE = ("value", "low", "high", "threshold")
VERDICTS = {True: ("passed", "✓"), False: ("failed", "✗"), None: ("not run", "–")}
_NOT_PRINTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # no HTML may hold these


def html(report: Values) -> str:
    """The page of a pipeline's ``report``; ``configs/pipeline.py`` says what decides on it.

    title, ok, seconds, seed, environment, failures: of all of it. stages, in order: what each did, its gates, what was
    tried. measures and board: what was measured of every model, with 95 % intervals. questions and transcript: what
    each model answered. curves: stage -> its rows of ``metrics.jsonl``. filtered: what was kept of the documents and
    what was dropped. Whatever is missing is left out of the page.
    """
    return _template().render(page(_plain(report)))


@functools.cache
def _template() -> jinja2.Template:
    where = jinja2.FileSystemLoader(Path(__file__).parent)
    how = dict(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return jinja2.Environment(loader=where, **how).get_template("report.html.jinja")


def page(report: Values) -> View:
    """Everything that the template names."""
    measures = report.get("measures") or {}
    stages = [stage(each, measures) for each in report.get("stages") or []]
    names = [each["name"] for each in stages]
    answers = report.get("transcript") or {}
    said = {name: answers[name] or [] for name in _ordered(answers, names)}
    asked = transcript(report.get("questions") or [], said)
    return {
        "title": report.get("title") or "The life of a model",
        "verdict": verdict(report, stages),
        "facts": facts(report),
        "failures": report.get("failures") or [],
        "stages": stages,
        "board": board(report.get("board") or [], measures),
        "transcript": asked,
        "telling": telling(asked),
        "curves": curves(report.get("curves") or {}, names),
        "filtered": filtered(report.get("filtered") or {}),
        "times": times(report.get("stages") or [], report.get("seconds")),
        "environment": environment(report),
        "changes": CHANGES,
        "colours": COLOURS,
    }


# ---- verdict ----


def verdict(report: Values, stages: Sequence[View]) -> View:
    """The one sentence that matters, and its sign."""
    gates = [gate["passed"] for stage in stages for gate in stage["gates"]]
    failed = [stage["name"] for stage in stages if stage["passed"] is False]
    missing = [stage["name"] for stage in stages if stage["passed"] is None]
    count = f"{len(gates)} gate{'s' if len(gates) != 1 else ''}"
    if failed:
        return _verdict(False, f"Failed {gates.count(False)} of {count}: {', '.join(failed)}")
    if missing:
        return _verdict(None, f"Passed {gates.count(True)} of {count}; not run: {', '.join(missing)}")
    return _verdict(True, f"Passed all {count}") if report.get("ok") else _verdict(None, f"Passed {count} so far")


def _verdict(passed: bool | None, text: str) -> View:
    return {"text": text, "outcome": VERDICTS[passed]}


def facts(report: Values) -> list[tuple[str, str]]:
    """(what, how much) of the whole."""
    stages, environment = report.get("stages") or [], report.get("environment") or {}
    again = sum(max(0.0, (known(each.get("attempts")) or 0.0) - 1) for each in stages)
    found = [
        ("Time", duration(report.get("seconds"))),
        ("Tokens trained on", amount(_total(stages, "tokens"), COUNTS)),
        ("FLOPs", amount(_total(stages, "flops"))),
        ("Stages run again", number(again)),
        ("Seed", str(report["seed"]) if report.get("seed") is not None else charts.UNKNOWN),
        ("Device", _device(environment)),
    ]
    return [(what, said) for what, said in found if said != charts.UNKNOWN]


def _total(stages: Sequence[Values], name: str) -> float | None:
    found = [value for value in (known(each.get(name)) for each in stages) if value is not None]
    return sum(found) if found else None


def _device(environment: Values) -> str:
    count, name = environment.get("devices"), environment.get("device")
    return charts.UNKNOWN if not name else f"{count} × {name}" if count and count != 1 else str(name)


# ---- stages ----


def stage(each: Values, measures: Values) -> View:
    """A row of the table of stages."""
    passed = each.get("passed")
    return {
        "name": str(each.get("name") or "?"),
        "about": each.get("about") or "",
        "passed": passed,
        "outcome": VERDICTS[passed],
        "gates": gates(each, measures),
        "attempts": each.get("attempts") or 0,
        "tried": [_attempt(one, each, measures) for one in each.get("tried") or []],
        "seconds": duration(each.get("seconds")),
        "tokens": amount(each.get("tokens"), COUNTS),
        "flops": amount(each.get("flops")),
        "mfu": number(each.get("mfu"), "share"),
        "command": each.get("command") or "",
    }


def gates(each: Values, measures: Values) -> list[View]:
    """A stage's gates, that of its metric first: those under "gates" by their metric, or itself."""
    found = each.get("gates") or ({each["metric"]: each} if each.get("metric") else {})
    first = sorted(found, key=lambda metric: metric != each.get("metric"))
    return [gate({**found[metric], "metric": metric}, measures) for metric in first]


def gate(each: Values, measures: Values) -> View:
    """A number beside the threshold that it must reach; ``over`` names the stage whose number was taken off.

    The better side is said by "bound" ("least" or "most") or by "best" ("max" or "min").
    """
    measure = measures.get(each["metric"]) or {}
    best = {"least": "max", "most": "min"}.get(each.get("bound"), each.get("best") or measure.get("best") or "max")
    (value, low, high, threshold), unit = _read([each.get(key) for key in GATE], each, measures)
    return {
        "name": _words(each["metric"]),
        "about": measure.get("about") or "",
        "over": each.get("over") or "",
        "value": _with_unit(value, unit),
        "interval": interval(low, high, unit),
        "needs": f"{'≤' if best == 'min' else '≥'} {_with_unit(threshold, unit)}",
        "passed": each.get("passed"),
        "outcome": VERDICTS[each.get("passed")],
        "picture": charts.gate(value, low, high, threshold, best, unit),
    }


def _read(values: Sequence[Any], each: Values, measures: Values) -> tuple[list[float | None], str]:
    """The numbers of a gate and their unit: the difference of two shares is in points."""
    unit = (measures.get(each.get("metric")) or {}).get("unit") or ""
    found = [known(value) for value in values]
    if unit == "share" and each.get("over"):
        return [None if value is None else 100 * value for value in found], "points"
    return found, unit


def _attempt(tried: Values, each: Values, measures: Values) -> View:
    (value,), unit = _read([tried.get("value")], each, measures)
    changes = {str(name): _change(change) for name, change in (tried.get("changes") or {}).items()}
    return {
        "number": number(tried.get("attempt")),
        "value": _with_unit(value, unit),
        "outcome": VERDICTS[tried.get("passed")],
        "changes": changes,
    }


def _change(change: Any) -> str:
    """[200, 300], from one to the other; or what it became."""
    both = change if isinstance(change, list) and len(change) == 2 else [change]
    return " → ".join(_setting(value) for value in both)


def _setting(value: Any) -> str:
    return charts.UNKNOWN if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _with_unit(value: Any, unit: str | None) -> str:
    said = number(value, unit or "")
    word = UNITS.get(unit, unit)
    return said if said == charts.UNKNOWN or not word else f"{said} {word}"


def _words(name: str) -> str:
    """answers.exact_match -> answers: exact match"""
    return str(name).replace(".", ": ").replace("_", " ").replace("/", ", ")


# ---- scoreboard ----


def board(rows: Sequence[Values], measures: Values) -> View:
    """A line for each measure, a cell in it for each model, with how it differs from the model it came from."""
    taken = [name for row in rows for name in row.get("values") or {}]
    names = list(dict.fromkeys([*measures, *taken]))
    stages = [str(row.get("stage")) for row in rows]
    lines = [_board_line(name, measures.get(name) or {}, rows) for name in names if name in taken]
    return {"stages": stages, "lines": lines}


def _board_line(name: str, measure: Values, rows: Sequence[Values]) -> View:
    cells = [(row.get("values") or {}).get(name) or {} for row in rows]
    before = {str(row.get("stage")): cell for row, cell in zip(rows, cells, strict=True)}
    unit, best = measure.get("unit"), measure.get("best") or "max"
    ends = charts.span([cell.get(key) for cell in cells for key in ("value", "low", "high")], unit)
    counts = sorted({count for cell in cells if (count := cell.get("count"))})
    pairs = zip(rows, cells, [{}, *cells], strict=False)
    return {
        "name": _words(name),
        "about": (measure.get("about") or "").rstrip("."),
        "unit": UNITS.get(unit, unit),
        "best": "Lower is better" if best == "min" else "Higher is better",
        "counts": " to ".join(dict.fromkeys(number(count) for count in (counts[:1] + counts[-1:]))),
        "cells": [_cell(cell, before.get(row.get("from"), last), ends, unit, best) for row, cell, last in pairs],
    }


def _cell(cell: Values, before: Values, ends: tuple[float, float], unit: str | None, best: str) -> View:
    value, low, high = (cell.get(key) for key in ("value", "low", "high"))
    return {
        "value": number(value, unit or ""),
        "interval": interval(low, high, unit or ""),
        "change": change(cell, before, best),
        "picture": charts.whisker(value, low, high, ends),
    }


def change(now: Values, before: Values, best: str) -> str:
    """A name of ``CHANGES``: whether the difference is larger than half its 95 % interval; "" where one is unknown.

    The interval is made of the two that are known, as of independent measurements (Newcombe 1998, "Interval estimation
    for the difference between independent proportions", method 10): of the same questions it is a little too wide.
    """
    value, other = known(now.get("value")), known(before.get("value"))
    if value is None or other is None:
        return ""
    facing, away = ("low", "high") if value > other else ("high", "low")
    ends = known(now.get(facing)), known(before.get(away))
    if None in ends:
        return ""
    if abs(value - other) <= math.hypot(value - ends[0], other - ends[1]):
        return "same"
    return "better" if (value > other) == (best != "min") else "worse"


# ---- curves, data, time, environment ----


def curves(rows: Mapping[str, Sequence[Values]], order: Sequence[str]) -> list[tuple[str, list[tuple[str, Curve]]]]:
    """Of each quantity, the curve of each stage that has it."""
    stages = _ordered(rows, order)
    drawn = [
        (panel.title, [(name, charts.curve(rows[name] or [], panel, name)) for name in stages])
        for panel in charts.PANELS
    ]
    found = [(title, [(name, curve) for name, curve in each if curve]) for title, each in drawn]
    return [(title, each) for title, each in found if each]


def filtered(found: Values) -> View:
    """What was kept of the documents, and what was dropped, most first."""
    kept, dropped, removed, planted = (found.get(key) or {} for key in ("kept", "dropped", "removed", "planted"))
    clean = found.get("clean") or {}
    total = sum(known(part.get("documents")) or 0 for part in (kept, *dropped.values()))
    parts = [{"reason": _words(reason), **_part(part, total)} for reason, part in dropped.items()]
    return {
        "any": bool(kept or dropped),
        "total": number(total),
        "kept": _part(kept, total),
        "dropped": sorted(parts, key=lambda part: -part["share"]),
        "removed": [(_words(kind), number(part.get("lines"))) for kind, part in removed.items()],
        "lost": (number(clean.get("lost")), number(clean.get("documents"))) if clean else None,
        "planted": [(_words(kind), number(caught), number(of)) for kind, (caught, of) in planted.items()],
    }


def _part(part: Values, total: float) -> View:
    documents = known(part.get("documents"))
    return {
        "documents": number(documents),
        "bytes": charts.UNKNOWN if known(part.get("bytes")) is None else _bytes(part["bytes"]),
        "share": documents / total if documents and total else 0.0,
        "examples": [_short(str(text)) for text in part.get("examples") or []],
    }


def _bytes(count: float) -> str:
    said = amount(count)
    return f"{said}B" if "\u00a0" in said else f"{said}\u00a0B"


def _short(text: str, most: int = 280) -> str:
    return text if len(text) <= most else f"{text[:most]} …"


def times(stages: Sequence[Values], total: float | None) -> list[View]:
    """What each stage took, and what was spent outside of them."""
    spent = [(str(each.get("name") or "?"), known(each.get("seconds"))) for each in stages]
    spent = [(name, seconds) for name, seconds in spent if seconds is not None]
    inside = sum(seconds for _, seconds in spent)
    total = max(known(total) or 0.0, inside)
    if total - inside > 0.01 * total:
        spent.append(("the rest", total - inside))
    longest = max((seconds for _, seconds in spent), default=0.0)
    return [
        {
            "name": name,
            "seconds": duration(seconds),
            "share": number(seconds / total, "share"),
            "length": seconds / longest,
        }
        for name, seconds in spent
        if longest
    ]


def environment(report: Values) -> View:
    found = report.get("environment") or {}
    command = found.get("command") or ""
    if not isinstance(command, str):
        command = shlex.join([*(["python"] if str(command[0]).endswith(".py") else []), *map(str, command)])
    rows = [("Python", found.get("python")), ("Device", _device(found)), ("Commit", found.get("commit"))]
    rows += [("Seed", report.get("seed"))]
    return {
        "rows": [(name, str(value)) for name, value in rows if value not in (None, "", charts.UNKNOWN)],
        "packages": sorted((found.get("packages") or {}).items()),
        "command": command,
    }


def _ordered(found: Mapping[str, Any], order: Sequence[str]) -> list[str]:
    """The names as the stages stand, others after them."""
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def _plain(value: Any) -> Any:
    """The same with a replacement character for each that no page may hold, and None for a number that is none."""
    if isinstance(value, str):
        return _NOT_PRINTED.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What a suite measured, in a run's directory: a table, JSON, a row per item, bars; of two runs how they differ."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jaxllm import figures, workdir
from jaxllm.evaluate import duels, perplexity, rewarding
from jaxllm.evaluate.measures import Difference, Measure, plain
from jaxllm.evaluate.suites import Evaluation, Settings, evaluated, loaded


def suite(name: str, directory: str, settings: Settings, *, step: int | None = None, compare: str = "") -> None:
    """Measures a run, and the run ``compare`` ("DIR" or "DIR@STEP") on the same; shows it, and writes it into the first
    run's directory. Raises ``ValueError`` as ``evaluated`` does, and for a run that is compared with itself.
    """
    runs = [partial(loaded, directory, step=step, sequence_length=settings.sequence_length)]
    if compare:
        other = duels.player(compare)
        if len({workdir.saved(run, step=at).identity for run, at in ((directory, step), other)}) == 1:
            raise ValueError(f"--compare={compare} is the same checkpoint: name another one, as DIR@STEP")
        runs.append(partial(loaded, other.run, step=other.step, sequence_length=settings.sequence_length))
    found = evaluated(name, runs, workdir.config(directory), settings)
    made = report(found, settings)
    flat = contract(found) if name == "perplexity" else {}
    _write(directory, name, made, flat)
    workdir.write_evaluation_items(directory, name, plain(rows(found)))
    if panels := bars(made):
        figures.bars(panels, Path(directory) / "figures" / "evaluation.png")
    _show(table(made), flat)


def reward(directories: Sequence[str], *, path: str = "", step: int | None = None) -> None:
    """Measures reward models, together if they are several: how often they prefer what people do, and how sure they
    are; ``figures/calibration.png``.
    """
    made, bins = rewarding.accuracy(directories, path=path, step=step)
    figures.calibration({" and ".join(directories): bins}, Path(directories[0]) / "figures" / "calibration.png")
    _write(directories[0], "reward", made, made)
    for name, value in made.items():
        print(f"{name:<20}" + (f"{value:,.6g}" if isinstance(value, float) else json.dumps(value)))


def _write(directory: str, name: str, made: Mapping[str, Any], flat: Mapping[str, Any]) -> None:
    """What other suites found stays beside it."""
    before = workdir.evaluation(directory)
    suites = {**before.get("suites", {}), name: made}
    workdir.write_evaluation(directory, plain({**before, **flat, "suites": suites}))


def _show(shown: Table, flat: Mapping[str, float]) -> None:
    Console().print(shown)
    for name, value in flat.items():
        print(f"{name:<20}{value:,.6g}")


def report(found: Evaluation, settings: Settings) -> dict[str, Any]:
    """What ``evaluation.json`` has of a suite; with two runs also the second's measures and their differences."""
    (label, items), *others = found.items.items()
    made = {"run": label, "groups": found.measures(label), "settings": dataclasses.asdict(settings)}
    made |= {name: sum(name in item for item in items) for name in ("too_long", "cut", "failures")}
    for other, _ in others:
        made["compared"] = {"run": other, "groups": found.measures(other), "differences": found.differences()}
    return made


def rows(found: Evaluation) -> list[dict[str, Any]]:
    """What ``evaluation_items.jsonl`` has: each run's items, numbered."""
    return [
        {"run": label, "item": number, **item}
        for label, items in found.items.items()
        for number, item in enumerate(items)
    ]


def table(report: Mapping[str, Any]) -> Table:
    """The report as the terminal has it: a line for each group and metric that anything was measured of."""
    other = report.get("compared")
    heads = ("first", "second", "difference", "95 %", "p", "items") if other else ("value", "95 %", "items")
    shown = Table("group", "metric", *(Column(head, justify="right", no_wrap=True) for head in heads))
    shown.caption = f"first: {report['run']}, second: {other['run']}" if other else report["run"]
    for group, measures in report["groups"].items():
        for name, measure in measures.items():
            if other:
                cells = _compared(other["differences"][group][name])
            else:
                cells = _number(measure.value), _range(measure), f"{measure.count:,}"
            shown.add_row(Text(group), Text(name), *cells)
    return shown


def bars(report: Mapping[str, Any]) -> dict[str, dict[str, dict[str, list[float | None]]]]:
    """The report as ``figures.bars`` draws it: a panel for each metric that has a value."""
    runs = [report, *filter(None, [report.get("compared")])]
    panels: dict[str, dict] = {}
    for run in runs:
        for group, measures in run["groups"].items():
            for name, measure in measures.items():
                known = [None if math.isnan(each) else each for each in measure[:3]]
                if known[0] is not None:
                    panels.setdefault(name.replace("_", " "), {}).setdefault(run["run"], {})[group] = known
    return panels


def contract(found: Evaluation) -> dict[str, float]:
    """The likelihood of all documents together, of the first run: what ``evaluation.json`` has at its top."""
    scores = [item["scores"] for item in next(iter(found.items.values()))]
    return perplexity.together(perplexity.Read("", each["nats"], each["tokens"], each["bytes"]) for each in scores)


def _compared(found: Difference) -> tuple[str, ...]:
    values = map(_number, (found.first, found.second, found.difference))
    p_value = "n/a" if math.isnan(found.p_value) else f"{found.p_value:.2g}"
    return *values, _range(found), p_value, f"{found.count:,}"


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:,.4g}"


def _range(found: Measure | Difference) -> str:
    return "n/a" if math.isnan(found.low) else f"{found.low:,.4g} to {found.high:,.4g}"

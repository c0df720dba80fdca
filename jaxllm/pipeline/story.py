"""What is told of a pipeline: a line for each gate, ``summary.json``, and the data of ``report.html``."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm import figures, metrics, workdir
from jaxllm.pipeline import report
from jaxllm.pipeline.config import PipelineConfig, StageConfig

Record = dict[str, Any]
SIGNS = {"least": "≥", "most": "≤"}


class Lived(NamedTuple):
    """A stage's attempts, and the one that counts."""

    tried: list[Record]
    chosen: Record


def verdict(stage: StageConfig, record: Record) -> Iterator[str]:
    """A line for each gate, as the terminal has it."""
    for metric in sorted(record["gates"], key=lambda name: name != stage.metric):
        gate = record["gates"][metric]
        yield f"  {_against(metric, gate)} " + ("[green]passed[/]" if gate["passed"] else "[red]fell short[/]")
    yield f"  [dim]{record['seconds']:.0f} s[/]"


def write(config: PipelineConfig, directory: str, lived: Sequence[Lived]) -> dict[str, Any]:
    """Writes ``summary.json`` and ``report.html`` of the stages so far; returns the former."""
    chosen = [each.chosen for each in lived]
    stages = [_stage(config, each) for each in lived]
    failed = [stage for stage in stages if not stage["passed"]]
    summary = {
        "ok": not failed and len(stages) == len(config.order),
        "seconds": sum(stage["seconds"] for stage in stages),
        "seed": config.seed,
        "title": config.title,
        "stages": stages,
    }
    full = summary | {
        "environment": workdir.environment(),
        "measures": {name: _measure(each) for name, each in config.measures.items()},
        "board": [_row(config, one) for one in chosen if config.stages[one["stage"]].measured],
        "curves": {one["stage"]: _rows(one) for one in chosen if _rows(one)},
        "filtered": next((one["numbers"]["report"] for one in chosen if "report" in one["numbers"]), {}),
        "failures": [f"{stage['name']}: {said} fell short" for stage in failed for said in _missed(stage["gates"])],
        **_transcript(config, chosen),
    }
    if panels := _bars(full["board"], full["measures"]):
        figures.bars(panels, Path(directory) / "figures" / "scoreboard.png")
    _replace(Path(directory) / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    _replace(Path(directory) / "report.html", report.html(full))
    return summary


def _stage(config: PipelineConfig, lived: Lived) -> dict[str, Any]:
    """A stage as ``summary.json`` has it: the attempt that counts, the time of all."""
    tried, chosen = lived
    name = chosen["stage"]
    stage = config.stages[name]
    gate = chosen["gates"][stage.metric]
    each = [
        {key: attempt[key] for key in ("attempt", "passed", "changes")}
        | {"value": attempt["gates"][stage.metric]["value"]}
        for attempt in tried
    ]
    return {
        "name": name,
        "about": stage.about,
        "metric": stage.metric,
        "over": gate["over"],
        **{key: gate[key] for key in ("value", "low", "high", "threshold")},
        "best": "max" if gate["bound"] == "least" else "min",
        "passed": chosen["passed"],
        "gates": chosen["gates"],
        "attempts": len(tried),
        "tried": each,
        "seconds": sum(attempt["seconds"] for attempt in tried),
        **{key: chosen.get(key) for key in ("tokens", "flops", "mfu", "command", "directory")},
    }


def _measure(measure: Any) -> dict[str, str]:
    return {key: getattr(measure, key) for key in ("about", "unit", "best")}


def _row(config: PipelineConfig, record: Record) -> dict[str, Any]:
    start = config.stages[record["stage"]].run.get("start", "")
    return {
        "stage": record["stage"],
        "from": start.strip("{}"),
        "values": {name: value for name, value in record["numbers"].items() if name in config.measures},
    }


def _bars(board: Sequence[Record], measures: Mapping[str, Any]) -> dict[str, dict[str, dict[str, list[float | None]]]]:
    """The scoreboard as ``figures.bars`` draws it: a panel for each measure, a bar for each model."""
    panels: dict[str, dict] = {}
    for row in board:
        for name, found in row["values"].items():
            title = f"{name}, {measures[name]['unit']}"
            panels.setdefault(title, {}).setdefault("", {})[row["stage"]] = [
                found[key] for key in ("value", "low", "high")
            ]
    return {title: runs for title, runs in panels.items() if any(each[0] is not None for each in runs[""].values())}


def _rows(record: Record) -> list[dict[str, Any]]:
    path = Path(record["directory"]) / "metrics.jsonl"
    return metrics.read(path) if path.is_file() else []


def _transcript(config: PipelineConfig, chosen: Sequence[Record]) -> dict[str, Any]:
    """The same questions of every stage that answers."""
    said = {one["stage"]: one["said"] for one in chosen if one["said"]}
    asked = next(iter(said.values()), [])
    questions = [{key: each[key] for key in ("prompt", "kind", "expected")} for each in asked]
    return {
        "questions": questions,
        "transcript": {name: [each["answer"] for each in all] for name, all in said.items()},
    }


def _against(metric: str, gate: Record) -> str:
    """sums over dpo 0.41 ≥ 0.3"""
    value = "unknown" if gate["value"] is None else f"{gate['value']:.4g}"
    over = f" over {gate['over']}" if gate["over"] else ""
    return f"{metric}{over} {value} {SIGNS[gate['bound']]} {gate['threshold']:.4g}"


def _missed(gates: Mapping[str, Record]) -> list[str]:
    return [_against(metric, gate) for metric, gate in gates.items() if not gate["passed"]]


def _replace(path: Path, text: str) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)

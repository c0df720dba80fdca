"""The life of a model in order: a stage is run, measured and held against its gates; one that falls short is adjusted
and run again, so many times.

What is finished has its record in ``attempts/``. A pipeline that was killed is started again with the same command: it
reads the records, and what has none goes on from where its own directory is.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from jaxllm import workdir
from jaxllm.configure import section
from jaxllm.evaluate.measures import plain
from jaxllm.pipeline import board, story
from jaxllm.pipeline.config import PipelineConfig, StageConfig, changed, flat, placed
from jaxllm.pipeline.kinds import KINDS, command
from jaxllm.pipeline.story import Lived, Record

Untold = Callable[[str], Mapping[str, Any]]  # a config's name -> the values of the run that names it alone


class Life(NamedTuple):
    """What the stages share. rows: stage -> what is measured of the model that it left; places: its directory."""

    config: PipelineConfig
    directory: str
    untold: Untold
    console: Console
    rows: dict[str, Mapping[str, Any]]
    places: dict[str, str]


def live(values: Mapping[str, Any], directory: str, *, untold: Untold) -> dict[str, Any]:
    """Runs all stages, and returns what ``summary.json`` holds; ``report.html`` grows with every stage.

    Raises ``ValueError`` for anything wrong with the config or the directory, and what a stage raises.
    """
    config = section(PipelineConfig, values)
    workdir.open(directory, values, mend=": what stages have learned stays as it is.")
    life = Life(
        config=config,
        directory=str(directory),
        untold=untold,
        console=Console(stderr=True, highlight=False),
        rows={},
        places=dict(config.files),
    )
    lived: list[Lived] = []
    for name in config.order:
        tried = list(_attempts(life, name))
        chosen = best(config.stages[name], tried)
        if chosen["directory"] is None:
            raise ValueError(f"the stage {name!r} has no result in {len(tried)} attempts: {chosen['error']}")
        life.places[name] = chosen["directory"]
        life.rows[name] = chosen["numbers"]
        lived.append(Lived(tried, chosen))
        summary = story.write(config, life.directory, lived)
    return summary


def best(stage: StageConfig, tried: list[Record]) -> Record:
    """The attempt that passed, or else the one that came nearest by the stage's metric."""
    sign = 1 if stage.gates[stage.metric].bound == "least" else -1

    def worth(record: Record) -> tuple:
        value = record["gates"][stage.metric]["value"]
        return record["passed"], value is not None, sign * (value or 0.0)

    return max(tried, key=worth)


def _attempts(life: Life, name: str) -> Iterator[Record]:
    """The stage's attempts, read where they are finished, until one passes or another would be the same run again."""
    stage = life.config.stages[name]
    number = life.config.order.index(name) + 1
    run = seeded(stage.run, life.config.seed)
    tried: list[Record] = []
    for attempt in range(1, stage.attempts + 1):
        changes = adjusted(run, stage, tried)
        if tried and changes == tried[-1]["changes"]:
            return
        again = f", attempt {attempt}" if attempt > 1 else ""
        life.console.rule(f"[bold]{number}/{len(life.config.order)} {name}{again}[/]: {stage.about}", align="left")
        path = Path(life.directory) / "attempts" / f"{name}_{attempt}.json"
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
        else:
            record = plain(_attempt(life, name, attempt, run, changes))
            _write(path, record)
        for line in story.verdict(stage, record):
            life.console.print(line)
        yield record
        if record["passed"]:
            return
        tried.append(record)


def _attempt(life: Life, name: str, attempt: int, run: Mapping[str, Any], changes: Mapping[str, list]) -> Record:
    stage, kind = life.config.stages[name], KINDS[life.config.stages[name].kind]
    directory = os.path.join(life.directory, name if attempt == 1 else f"{name}_{attempt}")
    values = placed(changed(run, {key: new for key, (_, new) in changes.items()}), life.places)
    usual = life.untold(stage.config) if stage.config else kind.usual
    typed = command(kind, values, usual, directory, stage.config)
    record = {"stage": name, "attempt": attempt, "changes": changes, "command": typed}
    life.console.print(f"[dim]{escape(typed)}[/]", soft_wrap=True)
    with clock(Path(life.directory) / "attempts" / f"{name}_{attempt}.times", Path(directory)) as seconds:
        try:
            numbers, said = kind.run(values, directory), []
            if stage.measured:
                how = {key: getattr(life.config, key) for key in ("measures", "prompts", "seed")}
                row = board.row(directory, life.places | {name: directory}, **how)
                numbers, said = {**numbers, **row.values}, row.said
        except FloatingPointError as error:
            life.console.print(f"[red]{escape(str(error))}[/]")
            record |= {"error": str(error)}
            directory, numbers, said = None, {}, []
    gates = held(stage, numbers, life.rows)
    passed = all(gate["passed"] for gate in gates.values())
    spent = kind.spent(directory) if directory else {}
    done = {"directory": directory, "numbers": numbers, "said": said, "seconds": seconds()}
    return record | done | spent | {"gates": gates, "passed": passed}


def seeded(run: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
    """The run's values under the pipeline's seed."""
    keys = [key for key in ("seed", "data.shuffle_seed") if key in flat(run)]
    return changed(run, dict.fromkeys(keys, seed))


def adjusted(run: Mapping[str, Any], stage: StageConfig, tried: Sequence[Record]) -> dict[str, list]:
    """key -> [what it was at first, what another attempt has], by the gates that each attempt before missed; whole
    numbers stay whole.
    """
    factors: dict[str, float] = {}
    for record in tried:
        missed = [gate for gate, found in record["gates"].items() if not found["passed"]] if record["numbers"] else []
        for key, factor in stage.factors(tuple(missed)).items():
            factors[key] = factors.get(key, 1.0) * factor
    before = {key: flat(run)[key] for key in factors}
    after = {key: old * factors[key] for key, old in before.items()}
    whole = {key: round(new) if isinstance(before[key], int) else new for key, new in after.items()}
    return {key: [before[key], new] for key, new in whole.items() if new != before[key]}


def held(stage: StageConfig, numbers: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Record]:
    """Each gate with the number that stands against it, the interval where it is known, and whether it passes.

    Raises ``ValueError`` for a gate about a number that neither the stage nor the board has.
    """
    found = {}
    for metric, gate in stage.gates.items():
        if numbers and metric not in numbers:
            raise ValueError(f"a gate is about {metric!r}, but the numbers of the stage are {sorted(numbers)}")
        value, low, high = _number(numbers.get(metric))
        if gate.over:
            if metric not in rows[gate.over]:
                raise ValueError(f"a gate is about {metric!r} over {gate.over!r}, which has {sorted(rows[gate.over])}")
            base, _, _ = _number(rows[gate.over][metric])
            value, low, high = (value - base if None not in (value, base) else None), None, None
        passed = value is not None and gate.passed(value)
        bound = {"bound": gate.bound, "threshold": gate.value, "over": gate.over}
        found[metric] = {"value": value, "low": low, "high": high, "passed": passed, **bound}
    return found


def _number(found: Any) -> tuple[float | None, float | None, float | None]:
    """The number, with an interval where it was measured on items."""
    if isinstance(found, Mapping):
        return found["value"], found["low"], found["high"]
    return found, None, None


@contextmanager
def clock(path: Path, directory: Path) -> Iterator[Callable[[], float]]:
    """Inside, a function that tells the seconds so far, those of processes that were killed here among them: each ended
    when it last wrote a file of the directory.
    """
    spent, now = 0.0, time.time()
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        ended = max((each.stat().st_mtime for each in directory.rglob("*")), default=0.0)
        spent = before["spent"] + max(ended - before["began"], 0.0)
    _write(path, {"spent": spent, "began": now})
    yield lambda: spent + time.time() - now


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)

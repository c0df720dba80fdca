"""The life of a model in order: a stage is run, measured and held against its gates; one that falls short is adjusted
and run again, so many times.

What is finished has its record in ``attempts/``. A pipeline that was killed is started again with the same command: it
reads the records, and what has none goes on from where its own directory is. Records are judged whenever they are read:
the same directory may be moved, or held against other gates and measures.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from jaxllm import workdir
from jaxllm.checkpoint import differences
from jaxllm.configure import section
from jaxllm.evaluate.measures import plain
from jaxllm.pipeline import board, story
from jaxllm.pipeline.checks import check, check_files
from jaxllm.pipeline.config import PipelineConfig, StageConfig, changed, flat, placed
from jaxllm.pipeline.kinds import KINDS, command
from jaxllm.pipeline.story import Lived, Record

Untold = Callable[[str], Mapping[str, Any]]  # a config's name -> the values of the run that names it alone
MEND = ": what stages have learned stays as it is, and only gates and measures may change."
# What decides on no run that is done.
JUDGING = re.compile(
    r"(title|prompts|measures|stages\.\w+\.(about|config|metric|measured|attempts|gates|adjust))(\..*)?"
)


class Life(NamedTuple):
    """What the stages share. rows: stage -> its numbers; left: stage -> its directory inside that of the pipeline."""

    config: PipelineConfig
    directory: str
    untold: Untold
    console: Console
    rows: dict[str, Mapping[str, Any]]
    left: dict[str, str]

    @property
    def inside(self) -> dict[str, str]:
        """Stage or file -> its path, that of a stage wherever the pipeline lies."""
        return {**self.config.files, **self.left}

    @property
    def places(self) -> dict[str, str]:
        """Stage or file -> where it lies now."""
        return self.inside | {name: os.path.join(self.directory, inner) for name, inner in self.left.items()}

    def kept(self, name: str, attempt: int, suffix: str = ".json") -> Path:
        return Path(self.directory) / "attempts" / f"{name}_{attempt}{suffix}"


def live(values: Mapping[str, Any], directory: str, *, untold: Untold) -> dict[str, Any]:
    """Runs all stages, and returns what ``summary.json`` holds; ``report.html`` grows with every stage.

    Raises ``ValueError`` for anything wrong with the config or the directory, and what a stage raises.
    """
    config, directory = section(PipelineConfig, values), os.path.expanduser(directory)
    check(config, untold)
    _open(config, values, directory)
    life = Life(config, directory, untold, Console(stderr=True, highlight=False), rows={}, left={})
    lived: list[Lived] = []
    for name in config.order:
        tried = list(_attempts(life, name))
        chosen = best(config.stages[name], tried)
        if chosen["directory"] is None:
            raise ValueError(f"the stage {name!r} has no result in {len(tried)} attempts: {chosen['error']}")
        life.left[name] = _inner(name, chosen["attempt"])
        life.rows[name] = chosen["numbers"]
        lived.append(Lived(tried, chosen))
        summary = story.write(config, life.directory, lived)
    return summary


def _open(config: PipelineConfig, values: Mapping[str, Any], directory: str) -> None:
    """Opens the pipeline's directory; what only judges may be other than it was, and is written down."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        check_files(config)
    differing = differences(workdir.config(directory), values) if path.is_file() else {}
    judging = all(map(JUDGING.fullmatch, differing))
    workdir.open(directory, values, accept_changes=judging, mend=MEND)
    workdir.write_json(path, values)


def best(stage: StageConfig, tried: list[Record]) -> Record:
    """The attempt that passed, or else the one that came nearest by the stage's metric."""
    sign = 1 if stage.gates[stage.metric].bound == "least" else -1

    def worth(record: Record) -> tuple:
        value = record["gates"][stage.metric]["value"]
        return record["passed"], value is not None, sign * (value or 0.0)

    return max(tried, key=worth)


def _attempts(life: Life, name: str) -> Iterator[Record]:
    """The stage's attempts: what is finished, and others until one passes, the next would be the same run again, or
    stages have gone on from those.
    """
    stage, order = life.config.stages[name], life.config.order
    number = order.index(name) + 1
    over = any(life.kept(later, 1, ".times").is_file() for later in order[number:])
    run = seeded(stage.run, life.config.seed)
    tried: list[Record] = []
    for attempt in range(1, stage.attempts + 1):
        changes = adjusted(run, stage, tried)
        path = life.kept(name, attempt)
        if not path.is_file() and tried and (over or tried[-1]["passed"] or changes == tried[-1]["changes"]):
            return
        again = f", attempt {attempt}" if attempt > 1 else ""
        life.console.rule(f"[bold]{number}/{len(order)} {name}{again}[/]: {stage.about}", align="left")
        if not path.is_file():
            _write(path, _attempt(life, name, attempt, run, changes))
        tried.append(_judged(life, name, run, json.loads(path.read_text(encoding="utf-8"))))
        for line in story.verdict(stage, tried[-1]):
            life.console.print(line)
        yield tried[-1]


def _attempt(life: Life, name: str, attempt: int, run: Mapping[str, Any], changes: Mapping[str, list]) -> Record:
    """Runs the stage, and returns what is kept of it: nothing in that depends on gates, or on where it lies."""
    kind = KINDS[life.config.stages[name].kind]
    directory = os.path.join(life.directory, _inner(name, attempt))
    record = {"stage": name, "attempt": attempt, "changes": changes, "run": _values(run, changes, life.inside)}
    life.console.print(f"[dim]{escape(_typed(life, run, record))}[/]", soft_wrap=True)
    with clock(life.kept(name, attempt, ".times"), Path(directory)) as seconds:
        try:
            numbers = kind.run(_values(run, changes, life.places), directory)
            record |= {"numbers": numbers, **kind.spent(directory), "row": _row(life, name, directory)}
        except FloatingPointError as error:
            life.console.print(f"[red]{escape(str(error))}[/]")
            record |= {"numbers": {}, "error": str(error)}
    return plain(record | {"seconds": seconds()})


def _judged(life: Life, name: str, run: Mapping[str, Any], record: Record) -> Record:
    """An attempt as it is seen now: where it lies, what is measured of it, anew where that was something else, and its
    gates. Raises ``ValueError`` where it went on from another attempt than the one that counts now.
    """
    stage, attempt = life.config.stages[name], record["attempt"]
    now = plain(_values(run, record["changes"], life.inside))
    if differing := differences(record.get("run", now), now):
        raise ValueError(_gone_on(name, differing))
    directory = None if "error" in record else os.path.join(life.directory, _inner(name, attempt))
    row = record.get("row")
    if directory and stage.measured and (row or {}).get("asked") != _asked(life):
        row = plain(_row(life, name, directory))
        _write(life.kept(name, attempt), record | {"row": row})
    numbers = record["numbers"] | (row["values"] if row else {})
    gates = held(stage, numbers, life.rows)
    return record | {
        "directory": directory,
        "command": _typed(life, run, record),
        "numbers": numbers,
        "said": row["said"] if row else [],
        "gates": gates,
        "passed": all(gate["passed"] for gate in gates.values()),
    }


def _row(life: Life, name: str, directory: str) -> dict[str, Any] | None:
    """What is measured of the model, beside what was asked of it; None of a stage that is not measured."""
    if not life.config.stages[name].measured:
        return None
    how = {key: getattr(life.config, key) for key in ("measures", "prompts", "seed")}
    return {"asked": _asked(life), **board.row(directory, life.places | {name: directory}, **how)._asdict()}


def _asked(life: Life) -> dict[str, Any]:
    return board.wanted(life.config.measures, life.config.prompts)


def _inner(name: str, attempt: int) -> str:
    return name if attempt == 1 else f"{name}_{attempt}"


def _values(run: Mapping[str, Any], changes: Mapping[str, list], places: Mapping[str, str]) -> Mapping[str, Any]:
    return placed(changed(run, {key: new for key, (_, new) in changes.items()}), places)


def _typed(life: Life, run: Mapping[str, Any], record: Record) -> str:
    """The command of an attempt."""
    stage, kind = life.config.stages[record["stage"]], KINDS[life.config.stages[record["stage"]].kind]
    usual = life.untold(stage.config) if stage.config else kind.usual
    directory = os.path.join(life.directory, _inner(record["stage"], record["attempt"]))
    return command(kind, _values(run, record["changes"], life.places), usual, directory, stage.config)


def _gone_on(name: str, differing: Mapping[str, tuple]) -> str:
    said = ", ".join(f"{key}: {there!r} there, {here!r} here" for key, (there, here) in differing.items())
    return (
        f"the stage {name!r} went on from what does not count by these gates ({said}): use others, or another --workdir"
    )


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

"""What a pipeline is: stages in order, the gates that each must pass, and what is measured of every model on the way.

``configs/pipeline.py`` explains each key beside its default.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxllm.configure import Section, nearest, section

KINDS = ("lessons", "clean", "tokenizer", "train")
SUITES = ("perplexity", "answers", "tasks", "choice", "win_rate")
UNITS = ("share", "bits", "nats", "points", "number")
BOUNDS = ("least", "most")
_PLACE = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """A bound of one number, less what the stage ``over`` has of it, where one is named.

    ``adjust`` is what is multiplied for another attempt where it is missed; if empty, what the stage says.
    """

    bound: str
    value: float
    over: str
    adjust: Mapping[str, Any]

    def __post_init__(self):
        if self.bound not in BOUNDS:
            raise ValueError(f"bound={self.bound!r} of a gate is not one of {BOUNDS}")
        if not math.isfinite(self.value):
            raise ValueError(f"value={self.value} of a gate is not finite: a stage could not miss it, or not pass it")

    def passed(self, value: float) -> bool:
        """Whether the number is within the bound; one that is not known is not."""
        return value >= self.value if self.bound == "least" else value <= self.value


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A stage: how it is run, what it must reach, and what is multiplied for another attempt where it does not.

    ``adjust`` is for gates that say nothing of their own, and for a run that diverged.
    """

    about: str
    kind: str
    config: str
    run: Mapping[str, Any]
    metric: str
    gates: Mapping[str, GateConfig]
    attempts: int
    adjust: Mapping[str, Any]
    measured: bool

    def __post_init__(self):
        gates = {
            name: part(GateConfig, gate, f"gates.{name}") if isinstance(gate, Mapping) else gate
            for name, gate in self.gates.items()
        }
        object.__setattr__(self, "gates", gates)
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} of a stage is not one of {KINDS}{nearest(self.kind, KINDS)}")
        if self.measured and self.kind != "train":
            raise ValueError(f"measured=True of a stage of kind={self.kind!r}: only 'train' leaves a model to measure")
        if self.metric not in self.gates:
            raise ValueError(f"metric={self.metric!r} has no gate{nearest(self.metric, self.gates)}")
        if self.attempts < 1:
            raise ValueError(f"attempts={self.attempts} must be at least 1")
        if self.attempts > 1 and not flat(self.adjust):
            raise ValueError(f"attempts={self.attempts}, but adjust says nothing to change for another one")
        _check_factors("adjust", self.adjust, flat(self.run))
        for name, gate in gates.items():
            _check_factors(f"gates.{name}.adjust", gate.adjust, flat(self.run))

    def factors(self, missed: tuple[str, ...]) -> dict[str, float]:
        """Key of the run -> what it is multiplied by for another attempt where these gates were missed; none: where the
        run diverged. What several gates ask for happens once, and what they ask against each other cancels out.
        """
        asked: dict[str, set[float]] = {}
        for adjust in [self.gates[name].adjust or self.adjust for name in missed] or [self.adjust]:
            for key, factor in flat(adjust).items():
                asked.setdefault(key, set()).add(factor)
        return {key: math.prod(factors) for key, factors in asked.items()}


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """A number that is measured of every model: a metric of a suite on a file or a task."""

    about: str
    unit: str
    best: str
    suite: str
    metric: str
    file: str
    task: str
    level: int
    count: int
    samples: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    against: str
    judge: str
    shown: int

    def __post_init__(self):
        for key, known in (("suite", SUITES), ("unit", UNITS), ("best", ("max", "min"))):
            if getattr(self, key) not in known:
                raise ValueError(f"{key}={getattr(self, key)!r} of a measure{nearest(getattr(self, key), known)}")
        if (self.suite == "win_rate") != bool(self.against):
            raise ValueError(
                f"against={self.against!r} of the suite {self.suite!r}: a win rate names a stage, others none"
            )


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Everything that decides a pipeline."""

    title: str
    seed: int
    order: tuple[str, ...]
    stages: Mapping[str, StageConfig]
    measures: Mapping[str, MeasureConfig]
    files: Mapping[str, str]
    prompts: tuple[str, ...]

    def __post_init__(self):
        made = {"stages": StageConfig, "measures": MeasureConfig}
        for key, cls in made.items():
            parts = {name: part(cls, each, f"config.{key}.{name}") for name, each in getattr(self, key).items()}
            object.__setattr__(self, key, parts)
        if sorted(self.order) != sorted(self.stages):
            raise ValueError(f"order={self.order} must have each stage of {sorted(self.stages)} once")
        _check_places("config.files", self.files, self.order)
        for number, name in enumerate(self.order):
            before = self.order[:number]
            ready = [file for file, path in self.files.items() if named(path) <= set(before)]
            _check_places(f"config.stages.{name}.run", self.stages[name].run, (*before, *ready))
            _check_gates(name, self.stages[name], before)
        for name, measure in self.measures.items():
            paths = {"file": measure.file, "judge": measure.judge}
            _check_places(f"config.measures.{name}", paths, (*self.order, *self.files))
            models = [each for each in self.order if self.stages[each].kind == "train"]
            if measure.against and measure.against not in models:
                key = f"config.measures.{name}.against={measure.against!r}"
                raise ValueError(f"{key} is no stage that leaves a model{nearest(measure.against, models)}")


def part(cls: type[Section], values: Mapping[str, Any], path: str) -> Section:
    """A section whose errors name where it stands."""
    with at(path):
        return section(cls, values, path=path)


@contextmanager
def at(path: str) -> Iterator[None]:
    """Inside, whatever is wrong with a config is a ``ValueError`` that names this key of it."""
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        said, inner = str(error), str(error).removeprefix("config.")
        raise ValueError(said if path in said else f"{path}{': ' if inner == said else '.'}{inner}") from error


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves by their names with dots between."""
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": leaf for name, leaf in flat(value).items()}
        else:
            found[key] = value
    return found


def changed(values: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with these leaves in place of its own."""
    made = {}
    for key, value in values.items():
        inner = {name.removeprefix(f"{key}."): leaf for name, leaf in leaves.items() if name.startswith(f"{key}.")}
        made[key] = changed(value, inner) if isinstance(value, Mapping) else leaves.get(key, value)
    return made


def named(value: Any) -> set[str]:
    """Every name that stands in braces in the texts of a value."""
    if isinstance(value, str):
        return set(_PLACE.findall(value))
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(named, parts))


def placed(value: Any, places: Mapping[str, str]) -> Any:
    """A value in whose texts each {name} is the path of that stage or file; what a file is may name a stage."""
    if isinstance(value, Mapping):
        return {key: placed(each, places) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(placed(each, places) for each in value)
    return _PLACE.sub(lambda found: placed(places[found[1]], places), value) if isinstance(value, str) else value


def _check_factors(name: str, adjust: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
    for key, factor in flat(adjust).items():
        if key not in numbers or isinstance(numbers[key], bool | str):
            raise ValueError(f"{name}.{key} is no number of the stage's run{nearest(key, numbers)}")
        if not 0 < factor < math.inf or factor == 1:
            raise ValueError(f"{name}.{key}={factor} changes nothing, or is no factor above 0")


def _check_places(name: str, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key, value in flat(values).items():
        for place in sorted(named(value) - set(known)):
            raise ValueError(
                f"{name}.{key}={value!r} names {place!r}: no stage before it, no file{nearest(place, known)}"
            )


def _check_gates(name: str, stage: StageConfig, before: tuple[str, ...]) -> None:
    for metric, gate in stage.gates.items():
        if gate.over and gate.over not in before:
            key = f"config.stages.{name}.gates.{metric}.over={gate.over!r}"
            raise ValueError(f"{key} is no stage before it{nearest(gate.over, before)}")

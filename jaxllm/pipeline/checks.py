"""What is wrong with a pipeline's config is said before its first stage runs, as far as it can be known then."""

import fnmatch
import glob
import os
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.configure import nearest
from jaxllm.data.made import require
from jaxllm.data.sources import EMBEDDED
from jaxllm.data.tasks import TASKS
from jaxllm.evaluate import judges
from jaxllm.generate import SamplerConfig
from jaxllm.pipeline import board
from jaxllm.pipeline.config import MeasureConfig, PipelineConfig, at, named
from jaxllm.pipeline.kinds import KINDS

ANSWERED = ("answers", "tasks")  # suites whose items have answers to show
OF_FILES = ("perplexity", "choice")  # suites that ask nothing without a file


def check(config: PipelineConfig, untold: Callable[[str], Mapping[str, Any]]) -> None:
    """Raises ``ValueError`` for a key of a run, a measure or a gate that no stage could do with, by its name."""
    for name, measure in config.measures.items():
        with at(path := f"config.measures.{name}"):
            _check_measure(measure, path)
    for name, stage in config.stages.items():
        with at(path := f"config.stages.{name}.run"):
            KINDS[stage.kind].check(stage.run, path)
        if stage.config:
            with at(f"config.stages.{name}.config={stage.config!r}"):
                untold(stage.config)
        _check_gates(config, name)


def check_files(config: PipelineConfig) -> None:
    """Raises ``ValueError`` for a file that is read, that no stage makes and that is not there."""
    measured = {f"config.measures.{name}.file": measure.file for name, measure in config.measures.items()}
    asked = named([*(stage.run for stage in config.stages.values()), *measured.values()])
    given = {f"config.files.{name}": path for name, path in config.files.items() if name in asked}
    for key, path in (given | measured).items():
        known = path in ("", EMBEDDED) or named(path) or os.path.exists(path)
        if not known and not glob.glob(path, recursive=True):
            raise ValueError(f"{key}={path!r} is not there: give a file, a folder or a glob")


def _check_measure(measure: MeasureConfig, path: str) -> None:
    require(1, **{key: getattr(measure, key) for key in ("samples", "level", "max_new_tokens", "batch_size")})
    require(0, count=measure.count, shown=measure.shown)
    SamplerConfig(measure.temperature)
    if measure.suite == "tasks" and measure.task not in TASKS:
        raise ValueError(f"{path}.task={measure.task!r} is no task{nearest(measure.task, TASKS)}")
    known = board.metrics(measure)
    if measure.metric not in known:
        key = f"{path}.metric={measure.metric!r}"
        raise ValueError(f"{key} is none of the suite {measure.suite!r}{nearest(measure.metric, known)}")
    if measure.shown and measure.suite not in ANSWERED:
        key = f"{path}.shown={measure.shown}"
        raise ValueError(f"{key} of the suite {measure.suite!r}: only those of {ANSWERED} have answers to show")
    if measure.suite in OF_FILES and not measure.file:
        raise ValueError(f"{path}.file='' of the suite {measure.suite!r} leaves nothing to read: name one")
    kind, _, what = measure.judge.partition(":")
    # A judge that is a run may be there only later.
    if kind == "rule" or kind not in judges.KINDS or not what:
        with at(f"{path}.judge"):
            judges.load(measure.judge)


def _check_gates(config: PipelineConfig, name: str) -> None:
    for metric, gate in config.stages[name].gates.items():
        for stage in filter(None, (name, gate.over)):
            known = _numbers(config, stage)
            if not any(fnmatch.fnmatchcase(metric, pattern) for pattern in known):
                key = f"config.stages.{name}.gates.{metric}" + f".over={stage!r}" * (stage == gate.over)
                raise ValueError(f"{key} is about a number that {stage!r} does not have{nearest(metric, known)}")


def _numbers(config: PipelineConfig, name: str) -> list[str]:
    """Patterns of the numbers that a stage has: what it returns, and the measures of a model that can be taken then."""
    stage, there = config.stages[name], config.order[: config.order.index(name) + 1]
    taken = [key for key, measure in config.measures.items() if not measure.against or measure.against in there]
    return [*KINDS[stage.kind].numbers, *(taken if stage.measured else [])]

"""The suites by name: what is asked of a run, and what is measured of its answers."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm import workdir
from jaxllm.checkpoint import whole_steps
from jaxllm.evaluate import choices, perplexity, replies
from jaxllm.evaluate.measures import Difference, Measure, Metric, compared, measured, ratio
from jaxllm.evaluate.perplexity import LARGEST_EXPONENT
from jaxllm.evaluate.replies import Asking
from jaxllm.model import Model, policy
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

ALL = "all"  # the group of all items
LIKENESS = ("exact_match", "contains", "bleu", "rouge_l")
_NAMED = re.compile(r"([\w-]+)=(.+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked, and how. files: name -> path, "" naming a single one; tasks: name -> level; count: the most items
    of a group, 0 being all. form: one of ``choices.FORMS``. sequence_length: tokens that are seen at a time, 0: as in
    training.

    Raises ``ValueError`` for a count or a length below 0, and for files with the name that all of them together have.
    """

    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    field: str = "text"
    form: str = "text"
    count: int = 0
    sequence_length: int = 0
    asking: Asking = Asking()

    def __post_init__(self):
        if min(self.count, self.sequence_length) < 0:
            raise ValueError(f"count={self.count}, sequence_length={self.sequence_length}: each must be 0 or more")
        if ALL in self.files:
            raise ValueError(f"--files={ALL}={self.files[ALL]}: so all files together are named; give another NAME=")


class Run(NamedTuple):
    """A run in memory at one of its steps. length: tokens that it sees at a time."""

    label: str
    model: Model
    params: Tree
    tokenizer: Tokenizer
    length: int


class Suite(NamedTuple):
    """ask: (settings, config of the first run) -> what every run is asked. measure: (run, what is asked, settings) ->
    an item for each thing asked, in order, with its "group" and "scores". metrics: settings -> what is measured.
    """

    ask: Callable[[Settings, Mapping[str, Any]], Sequence[Any]]
    measure: Callable[[Run, Sequence[Any], Settings], list[dict[str, Any]]]
    metrics: Callable[[Settings], Sequence[Metric]]


class Evaluation(NamedTuple):
    """What was measured of each run: label -> its items; groups: name -> numbers of its items."""

    metrics: Sequence[Metric]
    items: dict[str, list[dict[str, Any]]]
    groups: dict[str, list[int]]

    def measures(self, label: str) -> dict[str, dict[str, Measure]]:
        """group -> metric -> what a run has."""
        scores = [item["scores"] for item in self.items[label]]
        return {
            group: {metric.name: measured(metric, [scores[number] for number in numbers]) for metric in self.metrics}
            for group, numbers in self.groups.items()
        }

    def differences(self) -> dict[str, dict[str, Difference]]:
        """group -> metric -> the first run less the second."""
        one, other = ([item["scores"] for item in items] for items in self.items.values())
        return {
            group: {
                metric.name: compared(
                    metric, [one[number] for number in numbers], [other[number] for number in numbers]
                )
                for metric in self.metrics
            }
            for group, numbers in self.groups.items()
        }


def named_files(given: Iterable[str]) -> dict[str, str]:
    """name -> path of "NAME=GLOB"s, several of them with commas between; a path alone has the name "".

    Raises ``ValueError`` where a name comes twice.
    """
    found: dict[str, str] = {}
    for each in given:
        parts = each.split(",")
        several = all(map(_NAMED.fullmatch, parts)) and not Path(each).exists()
        for part in parts if several else [each]:
            name, path = _NAMED.fullmatch(part).groups() if several else ("", part)
            if name in found:
                raise ValueError(
                    f"--files names {name!r} twice: {found[name]} and {path}; give each a NAME= of its own"
                )
            found[name] = path
    return found


def named_levels(given: str) -> dict[str, int]:
    """task -> level of "NAME:LEVEL,NAME"; a level that is not named is 1.

    Raises ``ValueError`` for what is none, and where a task comes twice.
    """
    levels = {}
    for each in filter(None, given.split(",")):
        name, _, level = each.partition(":")
        if level and not level.isdecimal():
            raise ValueError(f"{each!r} is no task and level: write such as addition:2")
        if name in levels:
            raise ValueError(f"--tasks names {name!r} twice, the second time as {each!r}: ask for one level at a time")
        levels[name] = int(level or 1)
    return levels


def loaded(directory: str, *, step: int | None = None, sequence_length: int = 0) -> Run:
    """The run of a directory at a step, the newest unless told."""
    saved = workdir.saved(directory, step=step)
    model, params = policy(saved.model, saved.params())
    step = next(iter(whole_steps(Path(directory) / "checkpoints"))) if step is None else step
    length = sequence_length or workdir.config(directory)["data"]["sequence_length"]
    return Run(f"{directory}@{step}", model, params, saved.tokenizer, length)


def evaluated(
    name: str, runs: Iterable[Callable[[], Run]], config: Mapping[str, Any], settings: Settings
) -> Evaluation:
    """The runs, one at a time in memory, on what the suite of this name asks; config: the first run's.

    Raises ``ValueError`` where there is nothing to ask, and as the suites do.
    """
    suite = SUITES[name]
    asked, items = suite.ask(settings, config), {}
    if not asked:
        raise ValueError(f"the suite {name!r} has nothing to ask: give it --files with records, or --tasks")
    for load in runs:
        run = load()
        items[run.label] = suite.measure(run, asked, settings)
    groups = {ALL: list(range(len(next(iter(items.values())))))}
    for number, item in enumerate(next(iter(items.values()))):
        if item["group"]:
            groups.setdefault(item["group"], []).append(number)
    return Evaluation(suite.metrics(settings), items, groups)


def _limited(found: Sequence[Any], settings: Settings) -> Sequence[Any]:
    return found[: settings.count] if settings.count else found


# ---- perplexity ----


def _documents(settings: Settings, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    return list(settings.files.items() or [("", "")])


def _likelihoods(run: Run, sources: Sequence[tuple[str, str]], settings: Settings) -> list[dict[str, Any]]:
    what = dict(field=settings.field, count=settings.count)
    how = dict(sequence_length=run.length, batch_size=settings.asking.batch_size)
    items = []
    for group, path in sources:
        for read in perplexity.by_document(run.model, run.params, run.tokenizer, path=path, **what, **how):
            scores = {"nats": read.nats, "tokens": read.tokens, "bytes": read.num_bytes}
            items.append({"group": group, "prompt": read.text[:200], "scores": scores})
    return items


def _likelihood_metrics(settings: Settings) -> tuple[Metric, ...]:
    nats = ratio("nats_per_token", "nats", "tokens")
    return (
        nats,
        ratio("perplexity", "nats", "tokens", then=lambda x: np.exp(np.minimum(x, LARGEST_EXPONENT))),
        ratio("bits_per_byte", "nats", "bytes", then=lambda x: x / math.log(2)),
    )


# ---- answers and tasks ----


def _questions(settings: Settings, config: Mapping[str, Any]) -> list[replies.Question]:
    if not settings.files:
        return list(_limited(replies.held_out(config), settings))
    return [
        question._replace(group=group)
        for group, path in settings.files.items()
        for question in _limited(replies.of_file(path), settings)
    ]


def _problems(settings: Settings, config: Mapping[str, Any]) -> list[replies.Question]:
    if not settings.tasks:
        raise ValueError("no task is named: give --tasks, such as --tasks=addition:2,counting")
    return replies.of_tasks(settings.tasks, settings.count or 200)


def _replies(run: Run, asked: Sequence[replies.Question], settings: Settings) -> list[dict[str, Any]]:
    return replies.replies(run.model, run.params, run.tokenizer, asked, settings.asking, length=run.length)


def _reply_metrics(settings: Settings) -> tuple[Metric, ...]:
    return replies.metrics(settings.asking.samples)


def _task_metrics(settings: Settings) -> tuple[Metric, ...]:
    """A task has no reference text."""
    return tuple(each for each in _reply_metrics(settings) if each.name not in LIKENESS)


# ---- choice ----


def _choices(settings: Settings, config: Mapping[str, Any]) -> list[tuple[str, choices.Question]]:
    found = []
    for group, path in settings.files.items():
        found += [(group, each) for each in _limited(choices.of_file(path, form=settings.form), settings)]
    return found


def _chosen(run: Run, asked: Sequence[tuple[str, choices.Question]], settings: Settings) -> list[dict[str, Any]]:
    how = dict(form=settings.form, length=run.length, batch_size=settings.asking.batch_size)
    groups, questions = zip(*asked, strict=True)
    items = choices.scored(run.model, run.params, run.tokenizer, questions, **how)
    return [item | {"group": group} for item, group in zip(items, groups, strict=True)]


SUITES: dict[str, Suite] = {
    "perplexity": Suite(_documents, _likelihoods, _likelihood_metrics),
    "answers": Suite(_questions, _replies, _reply_metrics),
    "choice": Suite(_choices, _chosen, lambda settings: choices.METRICS),
    "tasks": Suite(_problems, _replies, _task_metrics),
}

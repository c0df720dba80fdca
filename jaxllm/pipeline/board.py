"""What is measured of every model of a pipeline, the same of each: a row of the scoreboard, and what it answered."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxllm import workdir
from jaxllm.evaluate import duels, judges, suites
from jaxllm.evaluate.continuations import continuations
from jaxllm.evaluate.measures import Measure, plain
from jaxllm.evaluate.replies import Asking
from jaxllm.evaluate.suites import ALL, Run, Settings, evaluated, loaded
from jaxllm.generate import SamplerConfig
from jaxllm.pipeline.config import MeasureConfig, placed

TOLD = ("about", "unit", "best")  # what only the report says of a measure
ABOUT = (*TOLD, "metric", "shown")  # what two measures may differ in, and are taken together
AGAINST = ("win_rate", "kl")  # what is measured against another run
LONGEST_CONTINUATION = 32


class Row(NamedTuple):
    """values: measure -> its number, interval and count; those that could not be taken are left out. said: what the
    model answered, as JSON can hold it: "prompt", "kind" ("text" or "chat"), "expected" (any of these), "answer".
    """

    values: dict[str, dict[str, float]]
    said: list[dict[str, Any]]


def row(
    directory: str,
    places: Mapping[str, str],
    *,
    measures: Mapping[str, MeasureConfig],
    prompts: Sequence[str] = (),
    seed: int = 0,
) -> Row:
    """What is measured of the run in ``directory``; places: stage or file -> its path."""
    run = loaded(directory)
    values, said = {}, _continued(run, prompts)
    for names in _together(measures):
        measure = measures[names[0]]
        if measure.against and measure.against not in places:
            continue
        ask = SUITES.get(measure.suite, _asked)
        found, items = ask(run, directory, placed_measure(measure, places), seed)
        values |= {name: plain(found[measures[name].metric]) for name in names}
        for name in names:
            said += _said(items, measures[name].shown)
    return Row(values, said)


def wanted(measures: Mapping[str, MeasureConfig], prompts: Sequence[str]) -> dict[str, Any]:
    """What decides a row besides the run and the seed, as JSON can hold it."""
    said = {name: dataclasses.asdict(measure).items() for name, measure in measures.items()}
    decided = {name: {key: value for key, value in each if key not in TOLD} for name, each in said.items()}
    return {"measures": decided, "prompts": list(prompts)}


def metrics(measure: MeasureConfig) -> list[str]:
    """What its suite can measure. Raises ``ValueError`` for what cannot be asked."""
    if measure.suite == "win_rate":
        return list(AGAINST)
    suite, how = suites.SUITES[measure.suite], settings(measure)
    if measure.suite == "tasks":
        suite.ask(how, {})
    return [metric.name for metric in suite.metrics(how)]


def placed_measure(measure: MeasureConfig, places: Mapping[str, str]) -> MeasureConfig:
    """The measure with the paths of what it names."""
    return dataclasses.replace(
        measure,
        file=placed(measure.file, places),
        against=places.get(measure.against, ""),
        judge=placed(measure.judge, places),
    )


def _together(measures: Mapping[str, MeasureConfig]) -> list[list[str]]:
    """The names of measures that differ in their metric alone, together."""
    groups: dict[tuple, list[str]] = {}
    for name, measure in measures.items():
        key = tuple(value for field, value in dataclasses.asdict(measure).items() if field not in ABOUT)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _asked(run: Run, directory: str, measure: MeasureConfig, seed: int) -> tuple[dict[str, Measure], list[dict]]:
    """A suite's metrics of all its items, and the items."""
    found = evaluated(measure.suite, [lambda: run], workdir.config(directory), settings(measure, seed))
    return found.measures(run.label)[ALL], found.items[run.label]


def settings(measure: MeasureConfig, seed: int = 0) -> Settings:
    how = {key: getattr(measure, key) for key in ("samples", "temperature", "max_new_tokens", "batch_size")}
    return Settings(
        files={"": measure.file} if measure.file else {},
        tasks={measure.task: measure.level} if measure.task else {},
        count=measure.count,
        asking=Asking(**how, seed=seed, workers=0),
    )


def _against(run: Run, directory: str, measure: MeasureConfig, seed: int) -> tuple[dict[str, Measure], list[dict]]:
    """How often a run wins against another by a judge, and how far it has gone from it, in nats of an answer."""
    reference, player = duels.player(measure.against), duels.player(directory)
    if reference == player:
        return {"win_rate": Measure(0.5, 0.5, 0.5, 0), "kl": Measure(0.0, 0.0, 0.0, 0)}, []
    sampler = SamplerConfig(measure.temperature)
    sampling = duels.Sampling(sampler, measure.max_new_tokens, batch_size=measure.batch_size, seed=seed)
    prompts = duels.prompts([reference], measure.file)[: measure.count or None]
    judge = {measure.judge: judges.load(measure.judge)}
    report = duels.contest(reference, {"policy": [player]}, prompts, judge, sampling).report
    row, count = report["players"][1], report["prompts"]
    won, error = row["judges"][measure.judge], 1.96 * row["kl_error"]
    return {
        "win_rate": Measure(won["win_rate"], won["low"], won["high"], count),
        "kl": Measure(row["kl"], row["kl"] - error, row["kl"] + error, count),
    }, []


SUITES = {"win_rate": _against}


def _said(items: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """So many of the items, evenly spread."""
    count = min(count, len(items))
    chosen = [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]
    return [
        {
            "prompt": item["prompt"][-1]["content"],
            "kind": "chat",
            "expected": list(item["references"]),
            "answer": item["answers"][0] if "answers" in item else None,
        }
        for item in chosen
    ]


def _continued(run: Run, prompts: Sequence[str]) -> list[dict[str, Any]]:
    if not prompts:
        return []
    how = dict(max_new_tokens=LONGEST_CONTINUATION, sampler=SamplerConfig(0.0))
    texts = continuations(run.model, run.params, run.tokenizer, prompts, jax.random.key(0), **how)
    return [
        {"prompt": prompt, "kind": "text", "expected": [], "answer": text}
        for prompt, text in zip(prompts, texts, strict=True)
    ]

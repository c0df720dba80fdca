"""AI feedback: several answers of a model to each prompt, and a judge's choice among them as a jsonl to learn from.

The file grows and is resumed as that of ``serve.dataset``; what the judge reports grows beside it.
"""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.evaluate import judges
from jaxllm.evaluate.answers import Answer, answered
from jaxllm.evaluate.duels import spoken
from jaxllm.evaluate.judges import Judge, Judgement
from jaxllm.generate import SamplerConfig
from jaxllm.metrics import Ratio
from jaxllm.model import Model
from jaxllm.serve import dataset
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

TOGETHER = 32  # prompts whose answers a judge sees at a time


class Candidate(NamedTuple):
    """An answer as the text that is judged, and as the message that is learned."""

    text: str
    message: Mapping[str, Any]


class Choice(NamedTuple):
    """What a judge's points make of the answers to a prompt.

    least: how many different answers it takes. record: (prompt, candidates, points) -> a record, or why there is none.
    """

    least: int
    record: Callable[[Conversation, Sequence[Candidate], np.ndarray], dict[str, Any] | str]


class Labels(NamedTuple):
    """counts: of all prompts, by what became of them. report: the judge's, averaged over all pairs."""

    counts: Counter
    report: dict[str, float]


def pair(prompt: Conversation, candidates: Sequence[Candidate], points: np.ndarray) -> dict[str, Any] | str:
    """The best answer against the worst, as the format "pairs" has it; "tie" where all are worth the same."""
    best, worst = int(np.argmax(points)), int(np.argmin(points))
    if points[best] == points[worst]:
        return "tie"
    return {
        **_asked("prompt", prompt.messages, prompt),
        "chosen": [candidates[best].message],
        "rejected": [candidates[worst].message],
        "score_chosen": float(points[best]),
        "score_rejected": float(points[worst]),
    }


def best(prompt: Conversation, candidates: Sequence[Candidate], points: np.ndarray) -> dict[str, Any] | str:
    """The conversation with the best answer, the first of several: what rejection sampling fine-tunes on."""
    place = int(np.argmax(points))
    messages = (*prompt.messages, candidates[place].message)
    return {**_asked("messages", messages, prompt), "score": float(points[place])}


PAIR, BEST = Choice(2, pair), Choice(1, best)


def write(
    path: str | os.PathLike,
    prompts: Sequence[Conversation],
    model: Model,
    params: Tree,
    tokenizer: Tokenizer,
    judge: Judge,
    *,
    choice: Choice,
    samples: int,
    made_by: Mapping[str, Any],
    max_new_tokens: int,
    sampler: SamplerConfig,
    batch_size: int,
    seed: int,
) -> Labels:
    """Appends to ``path`` the choice among ``samples`` answers to each prompt that it lacks.

    Answers that were cut, or are empty, are no candidates, and equal ones are one. A prompt with too few of them is
    counted under "identical" where equal ones would have been enough, else under "cut". What the judge reports of
    ``TOGETHER`` prompts at a time lies in ``path`` + ``.judged``; an interruption may make it report of some twice.
    Raises as ``dataset.write`` does, and where ``samples`` are fewer than the choice takes.
    """
    if samples < choice.least:
        raise ValueError(f"samples={samples} must be at least {choice.least}: answers to choose from")
    ids = [chat.prompt(prompt, tokenizer) for prompt in prompts for _ in range(samples)]
    how = dict(max_new_tokens=max_new_tokens, sampler=sampler, batch_size=batch_size, stop_ids=tokenizer.stop_ids)
    sampled = partial(answered, model, params, ids, jax.random.key(seed), **how)
    judged = Path(path).with_name(f"{Path(path).name}.judged")

    def records(known: set[int]) -> dataset.Entries:
        rows = {number * samples + sample for number in known for sample in range(samples)}
        for numbers, answers in _together(sampled(known=rows), samples):
            asked = [prompts[number] for number in numbers]
            usable = [[found for answer in row if (found := candidate(answer, tokenizer))] for row in answers]
            yield from zip(numbers, _chosen(judge, choice, asked, usable, partial(_note, judged)), strict=True)

    counts = dataset.append(path, records, total=len(prompts), made_by=made_by)
    return Labels(counts, _mean(dataset.whole_records(judged)))


def candidate(answer: Answer, tokenizer: Tokenizer) -> Candidate | None:
    """The answer as a candidate; None for one that was cut, or that says nothing."""
    message = chat.parse(answer.tokens, tokenizer)
    if not answer.ended or not (message["content"].strip() or "tool_calls" in message):
        return None
    return Candidate(spoken(tokenizer, answer), message)


def _together(sampled: Iterator[tuple[int, Answer]], samples: int) -> Iterator[tuple[list[int], list[list[Answer]]]]:
    """(numbers, answers to each) of so many prompts at a time as a judge sees, each once all its answers are there."""
    found: defaultdict[int, list[Answer]] = defaultdict(list)
    waiting: list[int] = []
    for row, answer in sampled:
        number = row // samples
        found[number].append(answer)
        if len(found[number]) == samples:
            waiting.append(number)
        if len(waiting) == TOGETHER:
            yield waiting, [found.pop(number) for number in waiting]
            waiting = []
    if waiting:
        yield waiting, [found.pop(number) for number in waiting]


def _chosen(
    judge: Judge,
    choice: Choice,
    prompts: Sequence[Conversation],
    usable: Sequence[Sequence[Candidate]],
    report: Callable[[Judgement], None],
) -> list[dict[str, Any] | str]:
    """The choice among the answers to each prompt, or why there is none. ``report`` is told of a judgement."""
    entries: list[dict[str, Any] | str] = ["identical" if len(row) >= choice.least else "cut" for row in usable]
    distinct = [list({found.text: found for found in row}.values()) for row in usable]
    asked = [place for place, row in enumerate(distinct) if len(row) >= choice.least]
    if asked:
        texts = [[found.text for found in distinct[place]] for place in asked]
        points, judgement = judges.points(judge, [prompts[place] for place in asked], texts)
        report(judgement)
        for place, worth in zip(asked, points, strict=True):
            entries[place] = choice.record(prompts[place], distinct[place], worth)
    return entries


def _note(path: Path, judgement: Judgement) -> None:
    known = {name: value for name, value in judgement.report.items() if not math.isnan(value)}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"pairs": len(judgement.wins), "report": known}) + "\n")


def _mean(notes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each number of the reports, averaged over the pairs of those that have it."""
    sums: defaultdict[str, Ratio] = defaultdict(lambda: Ratio(0.0, 0.0))
    for note in notes:
        for name, value in note["report"].items():
            sums[name] += Ratio(value * note["pairs"], note["pairs"])
    return {name: float(total.value) for name, total in sums.items()}


def _asked(field: str, messages: Sequence[Mapping], prompt: Conversation) -> dict[str, Any]:
    return {field: list(messages)} | ({"tools": list(prompt.tools)} if prompt.tools else {})

"""Self-rewarding: in rounds, a model answers, judges its own answers, and is trained on what it prefers; a judge from
outside says whether it improved.

Yuan et al. 2024, "Self-Rewarding Language Models", arXiv:2401.10020, with verdicts on pairs in place of marks.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich import box
from rich.table import Column, Table

from jaxllm import loop, workdir
from jaxllm.data.config import PREFERENCES
from jaxllm.evaluate import judges
from jaxllm.evaluate.answers import Answer
from jaxllm.evaluate.duels import spoken
from jaxllm.evaluate.judges import Judge
from jaxllm.evaluate.ranking import win_rate
from jaxllm.generate import SamplerConfig
from jaxllm.serve import dataset, labelling
from jaxllm.serve.dataset import Task
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.tokenizer import Tokenizer

Row = dict[str, Any]
COLUMNS = {  # of a table: name in a row -> what stands above it
    "round": "round", "written": "pairs", "agreement": "agrees", "consistency": "steady", "position_bias": "bias",
    "score": "score", "characters": "chars",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Manner:
    """How a round goes: who judges, and what is sampled."""

    outside: str  # the judge that compares rounds, and is never learned from
    judge: str = ""  # whose choice is learned; "" is the model's own, as it is before that round
    samples: int = 4  # answers to each prompt
    sampler: SamplerConfig = SamplerConfig()
    max_new_tokens: int = 64
    batch_size: int = 32
    seed: int = 0

    @property
    def sampling(self) -> dict[str, Any]:
        return dict(max_new_tokens=self.max_new_tokens, sampler=self.sampler, batch_size=self.batch_size)


class Work(NamedTuple):
    """What all rounds share. values: the config that each trains by. made_by: all that decides the rows."""

    values: Mapping[str, Any]
    directory: Path
    prompts: Sequence[Conversation]
    questions: Sequence[Conversation]
    manner: Manner
    outside: Judge
    made_by: Mapping[str, Any]

    def run(self, number: int) -> str:
        """The run directory of a round; round 0 is where the others start."""
        return str(self.directory / f"round_{number}" / "run") if number else self.values["start"]


def rounds(
    values: Mapping[str, Any],
    directory: str,
    prompts: Sequence[Conversation],
    questions: Sequence[Conversation],
    manner: Manner,
    *,
    count: int,
) -> list[Row]:
    """The rows of rounds.jsonl: round 0 is the run that ``values`` start from; each of ``count`` others is trained as
    they say, from the one before, on the preferences of that one over its answers to ``prompts``.

    A row has what the judge from outside says: of the answers to ``questions`` against those of round 0 (``win_rate``
    from ``low`` to ``high``, and mean ``score`` where it scores), and of the pairs that were learned (``agreement``,
    the share in which it would have chosen likewise, ties half). Beside it, mean ``characters`` of the answers, what
    became of the prompts, and the report of the round's own judge.

    The same call goes on after an interruption, and with a larger ``count`` too. Raises ``ValueError`` for a config
    without a source of preferences and where a round's judge decides nothing, and as training does.
    """
    if not _sources(values):
        raise ValueError("data.sources has no source of preferences, which each round writes: give such a config")
    made_by = {
        "config": values,
        "start": workdir.saved(values["start"]).identity,
        **{name: hashlib.sha256(repr(asked).encode()).hexdigest() for name, asked in
           (("prompts", prompts), ("questions", questions))},
        "manner": dataclasses.asdict(manner),
        "judges": [judges.identity(spec) for spec in (manner.outside, manner.judge) if spec],
    }  # fmt: skip
    made_by = json.loads(json.dumps(made_by))
    work = Work(values, Path(directory), prompts, questions, manner, judges.load(manner.outside), made_by)

    def records(known: set[int]) -> dataset.Entries:
        for number in range(count + 1):
            if number not in known:
                yield number, {"round": number, **(_learned(work, number) if number else {}), **_compared(work, number)}

    path = work.directory / "rounds.jsonl"
    dataset.append(path, records, total=count + 1, made_by=made_by, shown="")
    return dataset.whole_records(path)


def table(rows: Sequence[Row]) -> Table:
    """A line for each round."""
    made = Table(*COLUMNS.values(), Column("win rate", no_wrap=True), box=box.SIMPLE_HEAD)
    for row in rows:
        told = (row.get(name, "") for name in COLUMNS)
        cells = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in told)
        made.add_row(*cells, f"{row['win_rate']:.1%} ({row['low']:.0%} to {row['high']:.0%})")
    return made


def _learned(work: Work, number: int) -> Row:
    """Labels and trains: what became of the prompts, what the round's judge reports, how often the outside agrees."""
    manner, before, folder = work.manner, work.run(number - 1), work.directory / f"round_{number}"
    pairs = folder / "pairs.jsonl"
    model, params, tokenizer = workdir.load(before)
    judge = judges.load(manner.judge) if manner.judge else judges.prompted(model, params, tokenizer)
    labels = labelling.write(
        pairs,
        work.prompts,
        model,
        params,
        tokenizer,
        judge,
        choice=labelling.PAIR,
        samples=manner.samples,
        made_by={**work.made_by, "by": workdir.saved(before).identity},
        seed=manner.seed + number,
        **manner.sampling,
    )
    if not labels.counts["written"]:
        raise ValueError(
            f"round {number}: the judge prefers no answer to any of {len(work.prompts)} prompts ({labels})"
        )
    loop.run(_trained_on(work.values, str(pairs), before), work.run(number))
    return {**labels.counts, **labels.report, "agreement": _agreement(work.outside, dataset.whole_records(pairs))}


def _trained_on(values: Mapping[str, Any], pairs: str, start: str) -> dict[str, Any]:
    """The config with its preferences from this file and its start from this run."""
    own = {name: {**source, "path": pairs} for name, source in _sources(values).items()}
    return {**values, "start": start, "data": {**values["data"], "sources": {**values["data"]["sources"], **own}}}


def _sources(values: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: source for name, source in values["data"]["sources"].items() if source["format"] in PREFERENCES}


def _agreement(outside: Judge, pairs: Sequence[Row]) -> float:
    prompts = [Conversation(tuple(row["prompt"]), tuple(row.get("tools", ()))) for row in pairs]
    chosen, rejected = ([row[name][0]["content"] for row in pairs] for name in ("chosen", "rejected"))
    return float(outside(prompts, chosen, rejected).wins.mean())


def _compared(work: Work, number: int) -> Row:
    """What the outside judge says of this round's answers to the questions against those of round 0."""
    _answer(work, number)
    found, start = (_answers(work, each) for each in (number, 0))
    judgement = work.outside(work.questions, found, start)
    interval = win_rate(judgement.wins)
    score = {} if judgement.scores is None else {"score": float(judgement.scores[:, 0].mean())}
    rate = {"win_rate": interval.value, "low": interval.low, "high": interval.high}
    return {**score, "characters": fmean(map(len, found)), **rate}


def _answer(work: Work, number: int) -> None:
    """Writes a round's answers to the questions, sampled with the same key in every round."""
    model, params, tokenizer = workdir.load(work.run(number))
    tasks = [_task(question, tokenizer) for question in work.questions]
    how = {"made_by": {**work.made_by, "by": workdir.saved(work.run(number)).identity}, "seed": work.manner.seed}
    how |= {"stop_ids": tokenizer.stop_ids, **work.manner.sampling}
    dataset.write(_answers_path(work, number), tasks, model, params, **how)


def _answers(work: Work, number: int) -> list[str]:
    rows = dataset.whole_records(_answers_path(work, number))
    return [row["answer"] for row in sorted(rows, key=lambda row: row["task"])]


def _answers_path(work: Work, number: int) -> Path:
    return work.directory / f"round_{number}" / "answers.jsonl"


def _task(question: Conversation, tokenizer: Tokenizer) -> Task:
    def record(answer: Answer) -> Row:
        return {"question": question.messages[-1]["content"], "answer": spoken(tokenizer, answer)}

    return Task(chat.prompt(question, tokenizer), record)

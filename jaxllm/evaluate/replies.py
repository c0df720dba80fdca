"""What a run answers to questions whose right answers are known, each asked once or several times.

A question that lacks what a score needs goes without that score: it is not counted as wrong.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from itertools import filterfalse
from statistics import fmean
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.data import conversations, preferences
from jaxllm.data.problems import ANSWERS, FILE, ProblemSource, of_record, problems
from jaxllm.data.sources import DocumentSource
from jaxllm.evaluate import questions
from jaxllm.evaluate.answers import Answer, answered, corpus_bleu, rouge_l, sentence_bleu
from jaxllm.evaluate.duels import spoken
from jaxllm.evaluate.measures import Metric, mean, pass_at_k, powers, share, summed
from jaxllm.evaluate.rows import shown
from jaxllm.generate import SamplerConfig
from jaxllm.model import Model
from jaxllm.rewards import scoring
from jaxllm.rewards.scoring import Outcome, Term
from jaxllm.text import chat
from jaxllm.text.chat import Conversation, Malformed
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

REFERENCES, SEVERAL = "references", ("answers", *ANSWERS)  # fields of a file that may hold a list of texts
_TERMS = {"accuracy": Term("accuracy"), "format": Term("format")}


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are asked. samples: answers to each. workers: processes that verify them, 0: this one; time_limit:
    seconds for one answer. The rest is as of ``answers``.
    """

    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 128
    batch_size: int = 8
    seed: int = 0
    workers: int = 1
    time_limit: float = 10.0

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1")
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples={self.samples} at temperature=0 are all the same: set a temperature above 0")


class Question(NamedTuple):
    """references: texts to be like, if any. answers: what a verifier compares with, one of them being enough, if any;
    record: what else it needs. group: which questions it belongs to.
    """

    prompt: Conversation
    references: tuple[str, ...]
    answers: tuple[str, ...] = ()
    record: Mapping[str, Any] = {}
    group: str = ""


def of_file(path: str) -> list[Question]:
    """The questions of a file's records, in any format that problems are read in.

    References are the texts in "references", or in an answer ("answers", "answer" or "solution", a text or a list of
    accepted ones, by which answers are verified too), or the last turn of a conversation, or the chosen answer of
    preferences. Raises ``ValueError`` with file, line and mend at the first
    record that asks nothing, or whose right answer is blank.
    """
    return [question for record in DocumentSource(path).records() for question in record.parsed(_questions)]


def held_out(config: Mapping[str, Any]) -> list[Question]:
    """What a run holds out of its conversations or preferences. Raises ``ValueError`` where that is nothing."""
    if not config["data"].get("sources"):
        raise ValueError("the run's data have no sources to hold conversations out of: give --files")
    found = questions.held_out_answers(config)
    return [Question(prompt, (reference,) if _is_text(reference) else ()) for prompt, reference in found]


def of_tasks(levels: Mapping[str, int], count: int) -> list[Question]:
    """Up to so many held-out problems of each task, task -> level. Raises ``ValueError`` for an unknown one."""
    found = []
    for name, level in levels.items():
        drawn = problems({name: ProblemSource(name, level=level)}).validation(count)
        for prompt, record in drawn:
            found.append(Question(prompt, (), (record["answer"],), record, f"{name}:{level}"))
    return found


def metrics(samples: int) -> tuple[Metric, ...]:
    """What is measured of the items that ``replies`` gives."""
    rate = share if samples == 1 else mean
    passes = (share(f"pass@{k}") if k == samples else mean(f"pass@{k}") for k in powers(samples))
    bleu = summed("bleu", "bleu_counts", corpus_bleu)
    likeness = rate("exact_match"), rate("contains"), bleu, mean("rouge_l")
    lengths = mean("answer_tokens"), rate("answers_ended")
    return *likeness, rate("accuracy"), rate("format"), *passes, *lengths


def replies(
    model: Model, params: Tree, tokenizer: Tokenizer, asked: Sequence[Question], how: Asking, *, length: int
) -> list[dict[str, Any]]:
    """An item for each question, in order: its group, prompt, references, answers and scores.

    One that leaves no room for an answer within ``length`` tokens is "too_long" and has no scores. The batch size
    changes no number. Raises ``ValueError`` where all are too long.
    """
    prompts = [chat.prompt(question.prompt, tokenizer) for question in asked]
    fit = [number for number, ids in enumerate(prompts) if len(ids) + how.max_new_tokens <= length]
    if not fit:
        raise ValueError(
            f"none of {len(prompts)} prompts leaves room for max_new_tokens={how.max_new_tokens} in {length} tokens: "
            "lower --max_new_tokens, or raise --sequence_length"
        )
    each = how.samples
    flat = _answers(model, params, tokenizer, [prompts[number] for number in fit for _ in range(each)], how)
    found = {number: flat[place * each : (place + 1) * each] for place, number in enumerate(fit)}
    texts = {number: [spoken(tokenizer, answer) for answer in given] for number, given in found.items()}
    outcomes = _verified({number: asked[number] for number in fit}, texts, found, how)
    items = []
    for number, question in enumerate(asked):
        item = {"group": question.group, "prompt": list(question.prompt.messages)}
        item["references"] = list(question.references or question.answers)
        if number in found:
            scores = _scores(question, texts[number], found[number], outcomes[number])
            failures = [outcome.failure for outcome in outcomes[number] if outcome.failure]
            item |= {"answers": texts[number], "scores": scores} | ({"failures": failures} if failures else {})
        else:
            item |= {"too_long": True, "scores": {}}
        items.append(item)
    return items


def _answers(model, params, tokenizer, prompts, how: Asking) -> list[Answer]:
    given = dict(max_new_tokens=how.max_new_tokens, sampler=SamplerConfig(how.temperature), batch_size=how.batch_size)
    key = jax.random.key(how.seed)
    found = answered(model, params, prompts, key, stop_ids=tokenizer.stop_ids, **given)
    by_number = dict(shown(found, "answer", len(prompts)))
    return [by_number[number] for number in range(len(prompts))]


def _verified(asked: Mapping[int, Question], texts, found, how: Asking) -> dict[int, list[Outcome]]:
    """What the rules say of every answer to a question that has something to verify by; of others nothing."""
    with scoring.pool(_TERMS, workers=how.workers * _any_answers(asked), time_limit=how.time_limit) as submit:
        futures = {
            number: [
                [submit(question.prompt, text, _told(question, right, answer, how)) for right in question.answers]
                for text, answer in zip(texts[number], found[number], strict=True)
                if question.answers
            ]
            for number, question in asked.items()
        }
        work = shown(futures.items(), "verify", len(futures))
        return {number: [_best([each.result() for each in one]) for one in several] for number, several in work}


def _any_answers(asked: Mapping[int, Question]) -> bool:
    return any(question.answers for question in asked.values())


def _best(outcomes: Sequence[Outcome]) -> Outcome:
    """Of the comparisons with each accepted answer the one that is most right; of a failed one none is known."""
    return max(outcomes, key=lambda outcome: (not math.isnan(outcome.values["accuracy"]), outcome.values["accuracy"]))


def _told(question: Question, right: str, answer: Answer, how: Asking) -> dict[str, Any]:
    lengths = {"completion_tokens": len(answer.tokens), "max_new_tokens": how.max_new_tokens}
    return {**question.record, "answer": right, "ended": answer.ended, **lengths}


def _scores(question: Question, texts: Sequence[str], given: Sequence[Answer], outcomes: Sequence[Outcome]) -> dict:
    lengths = {"answer_tokens": fmean(len(answer.tokens) for answer in given)}
    scores = lengths | {"answers_ended": fmean(answer.ended for answer in given)}
    if question.references:
        scores |= _likeness(question.references, texts)
    values = {name: [outcome.values[name] for outcome in outcomes] for name in _TERMS}
    scores |= {name: fmean(each) for name, each in values.items() if each and not any(map(math.isnan, each))}
    if "accuracy" in scores:
        right = sum(value == 1 for value in values["accuracy"])
        scores |= {f"pass@{k}": pass_at_k(len(texts), right, k) for k in powers(len(texts))}
    return scores


def _likeness(references: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """How near answers come to the nearest reference: means over the answers, and counts of all of them."""
    bleu, counts = zip(*(sentence_bleu(references, text) for text in texts), strict=True)
    accepted = {reference.strip() for reference in references}
    return {
        "exact_match": fmean(text.strip() in accepted for text in texts),
        "contains": fmean(any(reference in text for reference in accepted) for text in texts),
        "rouge_l": fmean(max(rouge_l(reference, text) for reference in references) for text in texts),
        "sentence_bleu": fmean(bleu),
        "bleu_counts": np.sum(counts, axis=0).tolist(),
    }


def _questions(value: Any) -> list[Question]:
    """The question of one record; none of preferences without two answers. Raises Malformed."""
    lists = [
        field for field in (REFERENCES, *SEVERAL) if isinstance(value, Mapping) and isinstance(value.get(field), list)
    ]
    texts = {field: _texts(value[field], field) for field in lists}
    rest = {name: field for name, field in value.items() if name not in lists} if texts else value
    found = of_record(rest, ProblemSource(FILE, path=os.curdir), FILE)
    several = next((texts[field] for field in SEVERAL if field in texts), ())
    made = []
    for prompt, record in found:
        answers = several or ((record["answer"],) if "answer" in record else ())
        references = texts.get(REFERENCES) or answers or _last_turn(rest)
        for wrong in filterfalse(_is_text, (*references, *answers)):
            raise Malformed("not_text", f"a right answer is {wrong!r:.60}: give a text that is not blank, or no field")
        made.append(Question(prompt, references, answers, record))
    return made


def _texts(given: Sequence[Any], field: str) -> tuple[str, ...]:
    if not given or not all(map(_is_text, given)):
        raise Malformed("not_text", f"field {field!r} holds {given!r:.60}: give a list of one or more texts")
    return tuple(given)


def _is_text(given: Any) -> bool:
    """Not one that is blank: it would be contained in every answer."""
    return isinstance(given, str) and bool(given.strip())


def _last_turn(value: Mapping[str, Any]) -> tuple[str, ...]:
    """What a conversation ends with, or what preferences prefer; nothing where a record only asks."""
    try:
        said = preferences.preferences(value, preferences.detected(value))[0].chosen
    except Malformed:
        try:
            said = conversations.FORMATS[conversations.detected(value)](value).messages[-1:]
        except Malformed:
            return ()
    return tuple(message["content"] for message in said if message["role"] == "assistant" and message["content"])

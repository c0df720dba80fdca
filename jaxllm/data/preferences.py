"""Records to preferences between answers, in the formats that people have: one pure function per format.

A function makes messages out of fields; whether they make sense is the template's to say (`chat.check`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import isnan, nan
from typing import Any, NamedTuple

from jaxllm.data.conversations import Fields, asked, entries, message, system, tools, turns
from jaxllm.text import chat
from jaxllm.text.chat import Conversation, Malformed

Messages = tuple[Mapping[str, Any], ...]
Ranking = Callable[[Sequence[float]], list[tuple[int, int]]]  # scores -> places of a better and a worse one

_PROMPT = ("prompt", "instruction", "messages", "question")
_ANSWER, _ANSWERS = ("completion", "response", "answer"), ("completions", "responses", "answers")
_SCORE = ("score", "rating", "overall_score")
_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_LARGEST = 1e38  # of a number, in size: a store has 32 bits for it, and for the difference of two
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Preference(NamedTuple):
    """What people or judges said of answers to one prompt.

    prompt: up to where the assistant speaks. chosen, rejected: messages of the better and the worse answer, empty where
    only the other is known. margin: by how much; given, or the difference of the scores. tie: neither is better.
    """

    prompt: Conversation
    chosen: Messages = ()
    rejected: Messages = ()
    margin: float = 0.0
    chosen_score: float = nan
    rejected_score: float = nan
    annotator: str = ""
    tie: bool = False

    @property
    def flaw(self) -> str:
        """A short name of the reason for which nothing can be learned of it; empty where there is none."""
        answers = (self.chosen, self.rejected)
        if self.tie:
            return "tie"
        if any(said["role"] == "user" for answer in answers for said in answer):
            return "different_prompts"
        if not any(answers) or not all(map(_speaks, (self.prompt.messages, *answers))):
            return "empty_answer"
        return "identical" if self.chosen == self.rejected else ""


def detected(record: Fields) -> str:
    """The format whose fields a record has. Raises Malformed where it has those of none."""
    fields = set(record) if isinstance(record, Mapping) else set()
    if fields >= {"chosen", "rejected"}:
        return "pairs"
    if fields & set(_ANSWER) and "label" in fields:
        return "thumbs"
    if fields & set(_ANSWERS) or (fields & set(_ANSWER) and fields & set(_SCORE)):
        return "scored"
    raise Malformed(
        "unknown_format",
        f"{sorted(fields)} are the fields of no preference: pairs (chosen and rejected, and a prompt where they are no "
        "transcripts), scored (prompt, and responses with scores), thumbs (prompt, completion and label); rename them",
    )


def preferences(record: Fields, format: str, *, pairs: str = "all") -> list[Preference]:
    """What a record of this format says; what cannot be learned from has a `flaw`. Raises Malformed as a chat does.

    Args:
      pairs: of a list of scored answers "all" pairs, or "best_worst".
    """
    if not isinstance(record, Mapping):
        raise Malformed("not_an_object", f"a text is no record of format {format!r}; give .json, .jsonl or .parquet")
    annotator = str(record.get("annotator") or "")
    made = [preference._replace(annotator=annotator) for preference in FORMATS[format](record, PAIRS[pairs])]
    for preference in made:
        if not preference.flaw:
            _check(preference)
    return made


def answered(prompt: Conversation, answer: Messages) -> Conversation:
    """The conversation that the answer makes of its prompt."""
    return prompt._replace(messages=(*prompt.messages, *answer))


def _pairs(record: Fields, ranking: Ranking) -> list[Preference]:
    """{"prompt", "chosen", "rejected"}, or transcripts {"chosen", "rejected"}, whose common beginning is the prompt."""
    chosen, rejected = _spoken(record, "chosen"), _spoken(record, "rejected")
    if chosen[0]["role"] == "assistant":
        prompt = _prompt(record)
    else:
        beginning, chosen, rejected = _common_beginning(chosen, rejected)
        prompt = Conversation((*system(record), *beginning), tools(record))
    scores = [_number(record, field) for field in next((pair for pair in _SCORES if pair[0] in record), _SCORES[0])]
    margin = _number(record, "margin")
    if isnan(margin):
        margin = 0.0 if any(map(isnan, scores)) else scores[0] - scores[1]
    tie = record.get("tie") is not None and _bool(record["tie"], "tie")
    return [Preference(prompt, chosen, rejected, margin, *scores, tie=tie)]


def _scored(record: Fields, ranking: Ranking) -> list[Preference]:
    """{"prompt", "responses", "scores"} or {"prompt", "responses": [{"text", "score"}, ...]}: what differs in score.

    {"prompt", "response", "score"} is one answer, better than none.
    """
    prompt = _prompt(record)
    answers, scores = _answers_and_scores(record)
    if len(answers) == 1:
        return [Preference(prompt, answers[0], chosen_score=scores[0])]
    return [
        Preference(
            prompt, answers[a], answers[b], scores[a] - scores[b], scores[a], scores[b], tie=scores[a] == scores[b]
        )
        for a, b in ranking(scores)
    ]


def _thumbs(record: Fields, ranking: Ranking) -> list[Preference]:
    """KTO: {"prompt", "completion", "label": bool}: a chosen answer of score 1, or a rejected one of score 0."""
    label = _bool(record.get("label"), "label")
    prompt, answer = _prompt(record), _spoken(record, _first(_ANSWER, record))
    if label:
        return [Preference(prompt, chosen=answer, chosen_score=1.0)]
    return [Preference(prompt, rejected=answer, rejected_score=0.0)]


FORMATS: dict[str, Callable[[Fields, Ranking], list[Preference]]] = {
    "pairs": _pairs,
    "scored": _scored,
    "thumbs": _thumbs,
}


def _all_pairs(scores: Sequence[float]) -> list[tuple[int, int]]:
    return [(a, b) if scores[a] >= scores[b] else (b, a) for a, b in combinations(range(len(scores)), 2)]


def _best_and_worst(scores: Sequence[float]) -> list[tuple[int, int]]:
    ranked = sorted(range(len(scores)), key=lambda place: -scores[place])
    return [(ranked[0], ranked[-1])]


PAIRS: dict[str, Ranking] = {"all": _all_pairs, "best_worst": _best_and_worst}


def _prompt(record: Fields) -> Conversation:
    """What is asked: a text, a transcript, or messages."""
    field = _first(_PROMPT, record)
    if field == "instruction":
        said = asked(record)
    elif field == "messages":
        said = [message(each) for each in entries(record, field)]
    else:
        said = _transcript(record.get(field)) or turns(record, field, "user")
    if said and said[-1]["role"] == "assistant" and not said[-1]["content"]:
        said = said[:-1]  # a transcript that ends where the assistant is to speak
    return Conversation((*system(record), *said), tools(record))


def _spoken(record: Fields, field: str) -> Messages:
    """Messages of an answer, or of a transcript that ends with one."""
    said = _transcript(record.get(field)) or turns(record, field, "assistant")
    if not said:
        return _said("")
    if said[0]["role"] == "assistant" and not record.keys() & set(_PROMPT):
        raise Malformed("no_prompt", f"no prompt beside {field!r}, which is no transcript: {said[0]!r:.60}; add it")
    return tuple(said)


def _transcript(text: Any) -> list[dict[str, Any]]:
    """Turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", as HH-RLHF has them; none where this is no such text.

    Turns of one speaker in a row are one.
    """
    before, *parts = _SPEAKER.split(text) if isinstance(text, str) else [""]
    if before.strip() or parts[:1] != ["Human"]:
        return []
    said: list[dict[str, Any]] = []
    for speaker, content in zip(parts[::2], map(str.strip, parts[1::2]), strict=True):
        if said and said[-1]["role"] == _ROLES[speaker]:
            content = said.pop()["content"] + "\n\n" + content
        said.append({"role": _ROLES[speaker], "content": content})
    return said


def _common_beginning(a: Messages, b: Messages) -> tuple[Messages, Messages, Messages]:
    """What two transcripts share up to where the assistant speaks, and what follows in each."""
    shortest = min(len(a), len(b)) - 1
    length = next((place for place in range(shortest) if a[place] != b[place]), shortest)
    while length > 0 and a[length - 1]["role"] == "assistant":
        length -= 1
    return a[:length], a[length:], b[length:]


def _answers_and_scores(record: Fields) -> tuple[list[Messages], list[float]]:
    field = _first(_ANSWERS, record)
    if field in record:
        given = entries(record, field)
        scores = entries(record, "scores") if "scores" in record else [_score(each) for each in given]
    else:
        field = _first(_ANSWER, record)
        given, scores = [record.get(field)], [_score(record)]
    if not given or len(scores) != len(given):
        raise Malformed("no_score", f"{len(given)} answers in {field!r} with {len(scores)} scores; give each one")
    return [_answer(each) for each in given], [_finite(score, "score") for score in scores]


def _answer(given: Any) -> Messages:
    text = given.get(_first(("text", "content", *_ANSWER), given)) if isinstance(given, Mapping) else given
    if not isinstance(text, str):
        raise Malformed("not_text", f"an answer is {given!r:.60}, neither text nor an object with 'text'; mend it")
    return _said(text)


def _said(text: str) -> Messages:
    return ({"role": "assistant", "content": text},)


def _score(given: Any) -> Any:
    return given.get(_first(_SCORE, given)) if isinstance(given, Mapping) else None


def _number(record: Fields, field: str) -> float:
    """NaN where there is none."""
    return nan if record.get(field) is None else _finite(record[field], field)


def _finite(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        why = f"a {field} is {value!r:.40}, not a finite number of a size up to {_LARGEST}"
        raise Malformed(f"no_{field}", f"{why}; mend it")
    return float(value)


def _bool(value: Any, field: str) -> bool:
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise Malformed(f"no_{field}", f"field {field!r} holds {value!r:.40}, not true or false; mend it")
    return bool(value)


def _first(fields: Sequence[str], record: Fields) -> str:
    """The first of the fields that the record has; the first of all where it has none."""
    return next((field for field in fields if field in record), fields[0])


def _speaks(said: Messages) -> bool:
    """Whether none of the assistant's messages is empty."""
    own = [each for each in said if each["role"] == "assistant"]
    return all(each.get("tool_calls") or str(each["content"] or "").strip() for each in own)


def _check(preference: Preference) -> None:
    """Raises Malformed where nobody asks, or where an answer is not what the template takes."""
    messages = preference.prompt.messages
    if not messages or messages[-1]["role"] == "assistant":
        raise Malformed("no_prompt", "nobody asks: the prompt is empty, or the assistant speaks last in it; mend it")
    for answer in filter(None, (preference.chosen, preference.rejected)):
        if answer[-1]["role"] != "assistant":
            raise Malformed("no_answer", f"the last message is not the assistant's, but {answer[-1]!r:.60}; mend it")
        chat.check(answered(preference.prompt, answer))

"""Multiple choice by likelihood: which of the given answers a model finds likeliest after the question."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data import conversations
from jaxllm.data.problems import PROMPTS
from jaxllm.data.sources import DocumentSource
from jaxllm.evaluate.measures import Metric, share
from jaxllm.evaluate.scoring import Span, span_logps, text_span
from jaxllm.model import Model
from jaxllm.text import chat
from jaxllm.text.chat import Conversation, Malformed
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

DELIMITER = " "  # between a question and a choice in a document
METRICS: tuple[Metric, ...] = tuple(map(share, ("accuracy", "accuracy_per_character", "accuracy_per_byte")))


class Question(NamedTuple):
    """answer: which of the choices is right, from 0."""

    prompt: Conversation
    choices: tuple[str, ...]
    answer: int


def of_file(path: str, *, form: str) -> list[Question]:
    """The questions of a file's records: {"prompt" or "question", "choices": [texts], "answer": index}.

    form: one of ``FORMS``, in which they are to be read. Raises ``ValueError`` with file, line and mend at the first
    record that is none.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not one of {list(FORMS)}")

    def parse(value: Any) -> Question:
        question = _question(value)
        _CHECKS[form](question.prompt)
        return question

    return [record.parsed(parse) for record in DocumentSource(path).records()]


def scored(
    model: Model,
    params: Tree,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    form: str,
    length: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """An item for each question, in order: its prompt, choices, their log-probabilities, what is said and its scores.

    Accuracy is of the likeliest choice; "accuracy_per_character" and "accuracy_per_byte" of the likeliest for each
    character and each byte that it has: lm-eval's acc, acc_norm and acc_bytes. What is longer than ``length`` tokens
    is read without its beginning, and counted as "cut".
    """
    spans = [FORMS[form](tokenizer, question.prompt, choice) for question in questions for choice in question.choices]
    cut = [span.within(length) for span in spans]
    logps = span_logps(model, params, cut, length=length, batch_size=batch_size, doing="choose")
    ends = np.cumsum([len(question.choices) for question in questions])[:-1]
    each = zip(questions, np.split(logps, ends), np.split([span.cut for span in cut], ends), strict=True)
    return [_item(*one) for one in each]


def _item(question: Question, logps: np.ndarray, cut: np.ndarray) -> dict[str, Any]:
    characters = np.array([len(choice) for choice in question.choices])
    num_bytes = np.array([len(choice.encode()) for choice in question.choices])
    said = [int(np.argmax(logps / size)) for size in (1, characters, num_bytes)]
    scores = {metric.name: float(best == question.answer) for metric, best in zip(METRICS, said, strict=True)}
    item = {"group": "", "prompt": list(question.prompt.messages), "choices": list(question.choices)}
    item |= {"answer": question.answer, "logps": logps.tolist(), "said": said[0], "scores": scores}
    return item | ({"cut": int(cut.max())} if cut.any() else {})


def _document(tokenizer: Tokenizer, prompt: Conversation, choice: str) -> Span:
    return text_span(tokenizer, prompt.messages[0]["content"], DELIMITER + choice)


def _chat(tokenizer: Tokenizer, prompt: Conversation, choice: str) -> Span:
    """The choice as the beginning of what the assistant says: the end of its turn is not scored."""
    before, whole = chat.prompt(prompt, tokenizer), chat.prompt(prompt, tokenizer, start=choice)
    return Span([*before, *whole[len(before) :]], len(before))


FORMS: Mapping[str, Callable[[Tokenizer, Conversation, str], Span]] = {"text": _document, "chat": _chat}


def _question(value: Any) -> Question:
    field = next((field for field in PROMPTS if isinstance(value, Mapping) and field in value), "")
    if not field:
        fields = sorted(value) if isinstance(value, Mapping) else "a text"
        raise Malformed("no_prompt", f"{fields} asks nothing: name the question one of {', '.join(PROMPTS)}")
    choices, answer = value.get("choices"), value.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(each, str) and each for each in choices):
        raise Malformed("no_choices", f"'choices' is {choices!r:.60}: give a list of two or more texts")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        known = f"from 0 to {len(choices) - 1}"
        raise Malformed("no_answer", f"'answer' is {answer!r:.40}: give the number of the right choice, {known}")
    said = (*conversations.system(value), *conversations.turns(value, field, "user"))
    return Question(Conversation(said, conversations.tools(value)), tuple(choices), answer)


def _check_document(prompt: Conversation) -> None:
    if len(prompt.messages) != 1:
        raise Malformed("a_conversation", f"{len(prompt.messages)} messages are no text: read them with --chat")


def _check_chat(prompt: Conversation) -> None:
    chat.check(prompt._replace(messages=(*prompt.messages, {"role": "assistant", "content": "?"})))


_CHECKS = {"text": _check_document, "chat": _check_chat}

"""A source's examples: texts, conversations or units of preferences, each with its side of the split, or why it is
dropped.

The side depends on the content alone: on a text, or on what comes before a conversation's first answer, so that neither
a duplicate nor a prompt ever lies on both sides.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxllm.data import conversations, preferences, units
from jaxllm.data.config import AUTO, PREFERENCE, PREFERENCES, DataConfig, SourceConfig
from jaxllm.data.preferences import Preference, answered
from jaxllm.data.sources import DocumentSource, record_text
from jaxllm.data.units import Unit
from jaxllm.text import chat
from jaxllm.text.chat import Conversation, Malformed

TRAIN, VALIDATION = "train", "validation"


class Example(NamedTuple):
    """One document of a source.

    key: of its content; equal ones lie on the same side. read: bytes of the source read when it came.
    task: value of the source's tag. score: number to select by. dropped: why it is not used, empty where it is.
    """

    content: str | Conversation | Unit = ""
    key: int = 0
    read: int = 0
    task: str = ""
    score: float = 0.0
    dropped: str = ""

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(map(chat.text, self.conversations))

    @property
    def conversations(self) -> list[Conversation]:
        """Those that the content is made of; none of a text."""
        if isinstance(self.content, Unit):
            return self.content.conversations
        return [self.content] if isinstance(self.content, Conversation) else []


def resolved(source: SourceConfig) -> SourceConfig:
    """The source with its format, where that was to be detected: that of the first record, or, where bad ones are
    skipped, of the first that has one. Raises ValueError where there is none.
    """
    if source.format not in DETECTED:
        return source
    first = None
    for record in DocumentSource(source.path).records():
        try:
            return dataclasses.replace(source, format=record.parsed(DETECTED[source.format]))
        except Malformed as error:
            first = first or error
            if source.on_error == "raise":
                break
    raise first


DETECTED: dict[str, Callable[[Any], str]] = {AUTO: conversations.detected, PREFERENCE: preferences.detected}


def labelled(source: SourceConfig, config: DataConfig) -> Iterator[tuple[str, Example]]:
    """Each example with its side, or with the reason for which it is dropped."""
    examples = _examples(source, source.path)
    if source.validation_path:
        sides = _split_by_path(examples, _examples(source, source.validation_path))
    else:
        sides = SPLITS[config.split](examples, config.validation)
    if source.answers == "alone":
        sides = _mismatched(sides)
    for side, example in sides:
        if side == TRAIN and source.response_only and not example.dropped:
            example = example._replace(content=chat.responses(example.content))
        yield example.dropped or side, example


def _examples(source: SourceConfig, path: str) -> Iterator[Example]:
    parse = functools.partial(_preferred if source.format in PREFERENCES else _example, source)
    columns = () if source.is_chat else tuple(filter(None, (source.field, source.tag, source.score_field)))
    for record in DocumentSource(path, source.field).records(columns):
        try:
            examples = record.parsed(parse)
        except Malformed as error:
            if source.on_error == "raise":
                raise error.or_skip() from error
            examples = [Example(dropped=error.reason)]
        yield from (example._replace(read=record.read) for example in examples)


def _example(source: SourceConfig, value: str | Mapping[str, Any]) -> list[Example]:
    """What a record is to this source. Raises Malformed where it is nothing."""
    if source.is_chat:
        content = conversations.conversation(value, source.format)
        key = _prompt_key(content)
    else:
        content = record_text(value, source.field)
        key = content_key(content)
    return [Example(content, key, dropped="" if content else "empty", **_extras(source, value))]


def _preferred(source: SourceConfig, value: str | Mapping[str, Any]) -> list[Example]:
    """What the preferences of a record are to this source, or why they are nothing. Raises as `_example` does."""
    found, extras = [], _extras(source, value)
    for preference in preferences.preferences(value, source.format, pairs=source.pairs):
        key = _prompt_key(preference.prompt)
        flaw = preference.flaw or _unfit(source, preference)
        contents = [] if flaw else CONTENTS[source.answers](preference)
        found += [Example(each, key, **extras) for each in contents] or [Example(key=key, dropped=flaw)]
    return found


def _unfit(source: SourceConfig, preference: Preference) -> str:
    """Why a preference is none of those that the source is to give."""
    if source.answers == "chosen" and not preference.chosen:
        return "no_chosen"
    # a number alone, of which nobody says whether it is good
    return "no_verdict" if source.format == "scored" and source.answers == "alone" and not preference.rejected else ""


CONTENTS: dict[str, Callable[[Preference], list[Conversation] | list[Unit]]] = {
    **units.ANSWERS,
    "chosen": lambda preference: [answered(preference.prompt, preference.chosen)],
}


def _extras(source: SourceConfig, value: Any) -> dict[str, Any]:
    """The task and the score of a record."""
    task = str(_extra(value, source.tag, (str, int))) if source.tag else ""
    try:
        score = float(_extra(value, source.score_field, (int, float))) if source.score_field else 0.0
    except OverflowError:
        score = math.nan
    if math.isnan(score):
        why = f"field {source.score_field!r} is NaN, or too large for a float, and has no rank"
        raise Malformed("no_score", f"{why}; mend or remove it")
    return {"task": task, "score": score}


def _prompt_key(conversation: Conversation) -> int:
    """The key of what comes before the first answer; of the whole where nothing does."""
    asked = list(itertools.takewhile(lambda message: message["role"] != "assistant", conversation.messages))
    return content_key(json.dumps([conversation.tools, asked or conversation.messages]))


def _extra(value: Any, field: str, kinds: tuple[type, ...]) -> Any:
    found = value.get(field) if isinstance(value, Mapping) else None
    if not isinstance(found, kinds) or isinstance(found, bool):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise Malformed(f"no_{field}", f"field {field!r} holds {found!r:.40}, not {names}; add it, or mend it")
    return found


def _split_by_document(examples: Iterator[Example], share: float) -> Iterator[tuple[str, Example]]:
    for example in examples:
        yield VALIDATION if example.key < share * 2**64 else TRAIN, example


def _split_tail(examples: Iterator[Example], share: float) -> Iterator[tuple[str, Example]]:
    """The last `share` of the bytes of the only document; the cut never lies inside a character."""
    example, *more = itertools.islice(examples, 2)
    if more:
        raise ValueError("split='tail' holds out the end of the only document, the source has more: use 'document'")
    data = example.content.encode()
    head = data[: int(len(data) * (1 - share))].decode(errors="ignore")
    yield TRAIN, _of_text(head, example)
    if share:
        yield VALIDATION, _of_text(example.content[len(head) :], example)


def _of_text(text: str, example: Example) -> Example:
    return example._replace(content=text, key=content_key(text), dropped="" if text else "empty")


def _split_by_path(examples: Iterator[Example], held_out: Iterator[Example]) -> Iterator[tuple[str, Example]]:
    keys = set()
    for example in held_out:
        keys.add(example.key)
        yield VALIDATION, example._replace(read=0)
    for example in examples:
        yield "in_validation" if example.key in keys else TRAIN, example


def _mismatched(sides: Iterator[tuple[str, Example]]) -> Iterator[tuple[str, Example]]:
    """Each unit with an answer beside it to another prompt of its side."""
    neighbours = {TRAIN: _Neighbours(), VALIDATION: _Neighbours()}
    for side, example in sides:
        if example.dropped or side not in neighbours:
            yield side, example
        else:
            yield from ((side, each) for each in neighbours[side].take(example))
    for side, waiting in neighbours.items():
        yield from ((side, each) for each in waiting.finish())


class _Neighbours:
    """Takes units as they come, and gives them back with an answer to the prompt before their own.

    Those of the first prompt wait for the second. The answers to a prompt are given in their order, over and over: as
    many of them liked, and disliked, as there are.
    """

    def __init__(self):
        self._before: list[Example] = []
        self._waiting: list[Example] = []
        self._current: list[Example] = []

    def take(self, example: Example) -> Iterator[Example]:
        if self._current and self._current[0].key != example.key:
            yield from self._close()
        self._current.append(example)

    def finish(self) -> Iterator[Example]:
        yield from self._close()
        yield from (example._replace(dropped="no_other_prompt") for example in self._waiting)

    def _close(self) -> Iterator[Example]:
        if self._before:
            yield from _given(self._waiting, self._current)
            yield from _given(self._current, self._before)
            self._waiting = []
        else:
            self._waiting = self._current
        self._before, self._current = self._current, []


def _given(examples: list[Example], others: list[Example]) -> Iterator[Example]:
    for example, other in zip(examples, itertools.cycle(others), strict=False):
        yield example._replace(content=units.mismatched(example.content, other.content))


SPLITS: dict[str, Callable[[Iterator[Example], float], Iterator[tuple[str, Example]]]] = {
    "document": _split_by_document,
    "tail": _split_tail,
}


def content_key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=b"jaxllm").digest(), "little")

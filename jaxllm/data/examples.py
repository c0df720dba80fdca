"""A source's examples, texts or conversations, each with the side of the split that it lies on, or why it is dropped.

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

from jaxllm.data import conversations
from jaxllm.data.config import AUTO, DataConfig, SourceConfig
from jaxllm.data.sources import DocumentSource, record_text
from jaxllm.text import chat
from jaxllm.text.chat import Conversation, Malformed

TRAIN, VALIDATION = "train", "validation"


class Example(NamedTuple):
    """One document of a source.

    key: of its content; equal ones lie on the same side. read: bytes of the source read when it came.
    task: value of the source's tag. score: number to select by. dropped: why it is not used, empty where it is.
    """

    content: str | Conversation = ""
    key: int = 0
    read: int = 0
    task: str = ""
    score: float = 0.0
    dropped: str = ""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else chat.text(self.content)


def resolved(source: SourceConfig) -> SourceConfig:
    """The source with its format, where that was to be detected. Raises ValueError where the first record has none."""
    if source.format != AUTO:
        return source
    first = next(DocumentSource(source.path).records())
    return dataclasses.replace(source, format=first.parsed(conversations.detected))


def labelled(source: SourceConfig, config: DataConfig) -> Iterator[tuple[str, Example]]:
    """Each example with its side, or with the reason for which it is dropped."""
    examples = _examples(source, source.path)
    if source.validation_path:
        sides = _split_by_path(examples, _examples(source, source.validation_path))
    else:
        sides = SPLITS[config.split](examples, config.validation)
    for side, example in sides:
        if side == TRAIN and source.response_only and not example.dropped:
            example = example._replace(content=chat.responses(example.content))
        yield example.dropped or side, example


def _examples(source: SourceConfig, path: str) -> Iterator[Example]:
    parse = functools.partial(_example, source)
    columns = () if source.is_chat else tuple(filter(None, (source.field, source.tag, source.score_field)))
    for record in DocumentSource(path, source.field).records(columns):
        try:
            example = record.parsed(parse)
        except Malformed as error:
            if source.on_error == "raise":
                raise
            example = Example(dropped=error.reason)
        yield example._replace(read=record.read)


def _example(source: SourceConfig, value: str | Mapping[str, Any]) -> Example:
    """What a record is to this source. Raises Malformed where it is nothing."""
    if source.is_chat:
        content = conversations.conversation(value, source.format)
        key = content_key(json.dumps(_asked(content)))
    else:
        content = record_text(value, source.field)
        key = content_key(content)
    task = str(_extra(value, source.tag, (str, int))) if source.tag else ""
    score = float(_extra(value, source.score_field, (int, float))) if source.score_field else 0.0
    if math.isnan(score):
        raise Malformed("no_score", f"field {source.score_field!r} is NaN, which has no rank; mend or remove it")
    return Example(content, key, task=task, score=score, dropped="" if content else "empty")


def _asked(conversation: Conversation) -> list:
    """What comes before the first answer; the whole where nothing does."""
    asked = list(itertools.takewhile(lambda message: message["role"] != "assistant", conversation.messages))
    return [conversation.tools, asked or conversation.messages]


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


SPLITS: dict[str, Callable[[Iterator[Example], float], Iterator[tuple[str, Example]]]] = {
    "document": _split_by_document,
    "tail": _split_tail,
}


def content_key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=b"jaxllm").digest(), "little")

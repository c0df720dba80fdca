"""Sequence-level distillation: a teacher's answers to a prompt set, or its continuations of texts, as a jsonl to train
on. A line is written whole, and a work that was interrupted goes on as if it had not been.
"""

import functools
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import Progress

from jaxllm.checkpoint import differences
from jaxllm.data import conversations
from jaxllm.data.config import AUTO, SourceConfig
from jaxllm.data.examples import resolved
from jaxllm.data.sources import DocumentSource
from jaxllm.evaluate.answers import Answer, answered
from jaxllm.generate import SamplerConfig
from jaxllm.model import Model
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

Entries = Iterator[tuple[int, dict[str, Any] | str]]


class Task(NamedTuple):
    """What a teacher is asked: a prompt, and a function from its answer to the record that is written of it.

    The record is a text, the reason for which there is none, where the answer is not to be learned from.
    """

    prompt: list[int]
    record: Callable[[Answer], dict[str, Any] | str]


def questions(path: str, tokenizer: Tokenizer, *, format: str = AUTO, limit: int = 0) -> list[Task]:
    """A task per conversation of a chat source: its messages up to the last answer, which the teacher gives instead.

    Conversations without an answer are prompts too. Raises ``ValueError`` for a record that is none, with its place.
    """
    source = resolved(SourceConfig(path=path, format=format))
    read = functools.partial(_asked, conversations.FORMATS[source.format], tokenizer)
    return _tasks((record.parsed(read) for record in DocumentSource(path).records()), path, limit)


def prefixes(path: str, tokenizer: Tokenizer, *, field: str = "text", length: int = 32, limit: int = 0) -> list[Task]:
    """A task per text that is longer than ``length`` tokens: its first so many, which the teacher continues."""
    if length < 1:
        raise ValueError(f"prefix_tokens={length} must be at least 1")
    encoded = (tokenizer.encode(document.text) for document in DocumentSource(path, field).documents())
    record = functools.partial(_continued, tokenizer)
    tasks = (Task([*tokenizer.bos_ids, *ids[:length]], functools.partial(record, ids[:length])) for ids in encoded)
    return _tasks((task for task in tasks if len(task.prompt) == length + len(tokenizer.bos_ids)), path, limit)


def write(
    path: str | os.PathLike,
    tasks: Sequence[Task],
    model: Model,
    params: Tree,
    *,
    made_by: Mapping[str, Any],
    max_new_tokens: int,
    sampler: SamplerConfig,
    stop_ids: tuple[int, ...],
    batch_size: int,
    seed: int,
) -> Counter:
    """Appends to ``path`` a record of each task that it lacks, ``{"task": number, ...}``, and shows how far it is.
    Counts all records under "written", the others under their reasons.

    The latter are listed in ``path`` + ``.dropped``, so that they are not asked again. ``made_by`` is everything that
    decides the answers: it is kept in ``path`` + ``.made_by``, and where that says something else ``ValueError`` names
    the difference. Whatever lies at ``path`` without it is not overwritten: ``ValueError`` too.
    """
    how = dict(max_new_tokens=max_new_tokens, sampler=sampler, stop_ids=stop_ids, batch_size=batch_size)
    prompts = [task.prompt for task in tasks]

    def records(known: set[int]) -> Entries:
        for number, answer in answered(model, params, prompts, jax.random.key(seed), **how, known=known):
            yield number, tasks[number].record(answer)

    return append(path, records, total=len(tasks), made_by=made_by)


def append(
    path: str | os.PathLike,
    records: Callable[[set[int]], Entries],
    *,
    total: int,
    made_by: Mapping[str, Any],
    shown: str = "answers",
) -> Counter:
    """Appends to ``path`` what ``records`` yields of ``total`` tasks, given the numbers of those that are done.

    It yields (number, record, or the reason for which there is none). Files, counts and errors are those of ``write``.
    ``shown`` is the name of a progress bar; "" shows none.
    """
    path = Path(path)
    dropped = path.with_name(f"{path.name}.dropped")
    _begin(path, made_by)
    before = [*whole_records(path), *whole_records(dropped)]
    counts = Counter(record.get("dropped", "written") for record in before)
    bar = Progress(console=Console(stderr=True), disable=not (shown and sys.stderr.isatty()))
    with path.open("a", encoding="utf-8") as written, dropped.open("a", encoding="utf-8") as others, bar:
        progress = bar.add_task(shown, total=total, completed=len(before))
        for number, record in records({record["task"] for record in before}):
            reason = record if isinstance(record, str) else "written"
            file, fields = (written, record) if reason == "written" else (others, {"dropped": reason})
            file.write(json.dumps({"task": number, **fields}, ensure_ascii=False) + "\n")
            file.flush()
            counts[reason] += 1
            bar.advance(progress)
    return counts


def _tasks(found: Iterator[Task], path: str, limit: int) -> list[Task]:
    tasks = list(itertools.islice(found, limit or None))
    if not tasks:
        raise ValueError(f"{path} holds nothing to ask: give a source with conversations, or with longer texts")
    return tasks


def _asked(parse: Callable, tokenizer: Tokenizer, fields: Mapping) -> Task:
    conversation = parse(fields)
    roles = [message["role"] for message in conversation.messages]
    end = len(roles) - roles[::-1].index("assistant") - 1 if "assistant" in roles else len(roles)
    conversation = conversation._replace(messages=tuple(conversation.messages[:end]))
    return Task(chat.prompt(conversation, tokenizer), functools.partial(_replied, tokenizer, conversation))


def _replied(tokenizer: Tokenizer, conversation: Conversation, answer: Answer) -> dict[str, Any] | str:
    """The conversation with its answer. One that was cut would teach to stop anywhere, an empty one to say nothing."""
    if not answer.ended:
        return "cut"
    message = chat.parse(answer.tokens, tokenizer)
    if not message["content"].strip() and "tool_calls" not in message:
        return "empty"
    tools = {"tools": conversation.tools} if conversation.tools else {}
    return {"messages": [*conversation.messages, message], **tools}


def _continued(tokenizer: Tokenizer, prefix: list[int], answer: Answer) -> dict[str, Any] | str:
    """The text as far as the teacher wrote it, whether it came to an end or not."""
    return {"text": tokenizer.decode([*prefix, *(token for token in answer.tokens if token not in tokenizer.stop_ids)])}


def _begin(path: Path, made_by: Mapping[str, Any]) -> None:
    """Writes beside ``path`` what its answers are made by, or compares it with what was written."""
    beside = path.with_name(f"{path.name}.made_by")
    if not beside.exists():
        if path.exists():
            raise ValueError(f"{path} exists and nothing beside it says what made it; use another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")
    elif differing := differences(json.loads(beside.read_text(encoding="utf-8")), made_by):
        lines = (f"  {name}: {saved!r} there, {wanted!r} here" for name, (saved, wanted) in differing.items())
        raise ValueError(
            "\n".join([f"{path} holds answers that were made by something else:", *lines, "Use another --out."])
        )


def whole_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, from whose end a line that was cut is removed."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]

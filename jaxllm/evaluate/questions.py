"""What to ask models: prompts as conversations, held out by the runs themselves or out of a file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxllm.configure import section
from jaxllm.data import conversations, preferences
from jaxllm.data.config import DataConfig
from jaxllm.data.examples import TRAIN, VALIDATION, Example, labelled, resolved
from jaxllm.data.sources import DocumentSource
from jaxllm.data.units import Unit
from jaxllm.text.chat import Conversation, Malformed


def held_out(configs: Sequence[Mapping[str, Any]]) -> list[Conversation]:
    """The prompts that the first run holds out and that none of the runs is trained on.

    ``configs`` are the runs' configs; their sources of conversations and of preferences are read again. Prompts stand
    in the order of their keys, so that any number of the first ones is a random choice. Raises ``ValueError`` where
    there are none, and as the sources do.
    """
    return [_prompt(content) for content in _held_out(configs)]


def held_out_answers(config: Mapping[str, Any]) -> list[tuple[Conversation, str]]:
    """(prompt, the answer that the data give) of what a run holds out: the last one, of preferences the chosen one.

    In the order of ``held_out``, and with its errors.
    """
    return [(_prompt(content), _given(content)) for content in _held_out([config])]


def _held_out(configs: Sequence[Mapping[str, Any]]) -> list[Conversation | Unit]:
    sides = [_sides(config) for config in configs]
    trained = set().union(*(trained for trained, _ in sides))
    found = {key: content for key, content in sorted(sides[0][1].items()) if key not in trained}
    if not found:
        raise ValueError(
            f"of {len(sides[0][1])} prompts that the first run holds out the others were trained on all: hold out some "
            "(data.validation), from the same data, or give --questions"
        )
    return list(found.values())


def of_file(path: str) -> list[Conversation]:
    """Each prompt of a file once: the lines of a .txt, or records in any format of conversations or preferences.

    A conversation is a prompt up to its last answer. Raises ``ValueError`` where there is no prompt, and with the place
    of a record that is none.
    """
    found = [prompt for record in DocumentSource(path).records() for prompt in record.parsed(_asked)]
    if not found:
        raise ValueError(f"{path} holds no question: write one on each line, or give conversations")
    return list({repr(prompt): prompt for prompt in found}.values())


def _sides(config: Mapping[str, Any]) -> tuple[set[int], dict[int, Conversation | Unit]]:
    """(keys of what a run is trained on, key -> what it holds out, the first with that prompt)."""
    data = section(DataConfig, config["data"], path="config.data")
    trained: set[int] = set()
    out: dict[int, Conversation | Unit] = {}
    for example_side, example in _examples(data):
        if example_side == TRAIN:
            trained.add(example.key)
        elif example_side == VALIDATION:
            out.setdefault(example.key, example.content)
    return trained, out


def _examples(data: DataConfig) -> Iterable[tuple[str, Example]]:
    for source in data.sources.values():
        if source.is_chat:
            yield from labelled(resolved(source), data)


def _prompt(content: Conversation | Unit) -> Conversation:
    """What is asked: all before the last answer."""
    if isinstance(content, Unit):
        return content.prompt
    roles = [message["role"] for message in content.messages]
    end = len(roles) - roles[::-1].index("assistant") - 1 if "assistant" in roles else len(roles)
    return content._replace(messages=tuple(content.messages[:end]))


def _given(content: Conversation | Unit) -> str:
    messages = content.first if isinstance(content, Unit) else content.messages
    return next((message["content"] for message in reversed(messages) if message["role"] == "assistant"), "")


def _asked(value: Any) -> list[Conversation]:
    """The prompts of one record. Raises Malformed where it has none."""
    if isinstance(value, str):
        return [Conversation(({"role": "user", "content": line},)) for line in value.splitlines() if line.strip()]
    if kind := _kind(preferences.detected, value):
        return [preference.prompt for preference in preferences.preferences(value, kind)]
    if not _kind(conversations.detected, value) and "prompt" in value:
        return [Conversation(tuple(conversations.turns(value, "prompt", "user")))]
    # Not `conversation`, which asks for an answer: this one is to be given.
    return [_prompt(conversations.FORMATS[conversations.detected(value)](value))]


def _kind(detected: Callable[[Any], str], value: Any) -> str:
    """The format that a record is of; empty where it is of none."""
    try:
        return detected(value)
    except Malformed:
        return ""

"""What is said: a conversation, what it becomes, and how it is refused."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Conversation(NamedTuple):
    """messages: mappings of "role", "content" and, of an assistant, "tool_calls": [{"name", "arguments"}, ...].

    tools: definitions of what the assistant may call, as JSON can hold them.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


class Rendered(NamedTuple):
    """tokens: int32 ids. supervised: bool for each, True for what a model learns to say."""

    tokens: np.ndarray
    supervised: np.ndarray

    def trimmed(self) -> "Rendered":
        """Without what a template writes behind the last answer: no answer has it when it is sampled."""
        end = int(np.flatnonzero(self.supervised)[-1]) + 1
        return Rendered(self.tokens[:end], self.supervised[:end])


class Malformed(ValueError):
    """What cannot be used, why, and the mend. reason: a short name for it, to count by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def or_skip(self) -> "Malformed":
        """The same, where a source may leave such records out instead."""
        return Malformed(self.reason, f"{self}; or leave such records out, and count them, with on_error='skip'")


TURNS = {"all": slice(None), "last": slice(-1, None)}  # which of the assistant's turns are supervised


def is_call(value: Any) -> bool:
    """Whether this is {"name": text, "arguments": object} and nothing else."""
    return (
        isinstance(value, Mapping)
        and value.keys() == {"name", "arguments"}
        and isinstance(value["name"], str)
        and isinstance(value["arguments"], Mapping)
    )


def answer(content: str, calls: list) -> dict[str, Any]:
    """The assistant's message with this content and these calls."""
    message = {"role": "assistant", "content": content}
    return message | {"tool_calls": calls} if calls else message
